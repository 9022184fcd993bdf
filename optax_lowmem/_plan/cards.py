"""Cards by name: how much memory they have, and how XLA's compiler wants them described.

Figures are those of the data sheets, but for memory: that is what CUDA reports, where it is known.
"""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple

from optax_lowmem._arguments.spelling import did_you_mean

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Card:
  """One kind of GPU.

  Attributes:
    name: as its driver calls it.
    capability: CUDA's compute capability.
    cores: multiprocessors.
    memory: bytes of device memory that a program finds.
    bandwidth: bytes a second of device memory.
    clock: GHz.
    l2: bytes of L2 cache.
    shared: bytes of shared memory of a multiprocessor.
    threads: most threads of a multiprocessor.
    link: bytes a second to host memory, one way.
  """

  name: str
  capability: tuple[int, int]
  cores: int
  memory: int
  bandwidth: float
  clock: float
  l2: int
  shared: int
  threads: int
  link: float

  def target_config(self) -> str:
    """The text form of XLA's `GpuTargetConfigProto`."""
    major, minor = self.capability
    return f"""
      gpu_device_info {{
        cuda_compute_capability {{ major: {major} minor: {minor} }}
        core_count: {self.cores} fpus_per_core: 128 clock_rate_ghz: {self.clock}
        memory_bandwidth: {int(self.bandwidth)} device_memory_size: {self.memory}
        l2_cache_size: {self.l2} shared_memory_per_core: {self.shared}
        shared_memory_per_block: 49152 shared_memory_per_block_optin: {self.shared - 1024}
        threads_per_core_limit: {self.threads} threads_per_block_limit: 1024 threads_per_warp: 32
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      }}
      platform_name: "CUDA" device_description_str: "{self.name}"
      dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 13 minor: 0 patch: 0 }}
    """


CARDS: dict[str, Card] = {
  "h100": Card(
    name="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    cores=132,
    memory=84_929_347_584,
    bandwidth=3.352e12,
    clock=1.98,
    l2=50 << 20,
    shared=228 << 10,
    threads=2048,
    link=64e9,
  ),
  "h200": Card(
    name="NVIDIA H200",
    capability=(9, 0),
    cores=132,
    memory=150_000_000_000,
    bandwidth=4.8e12,
    clock=1.98,
    l2=50 << 20,
    shared=228 << 10,
    threads=2048,
    link=64e9,
  ),
  "a100-80gb": Card(
    name="NVIDIA A100-SXM4-80GB",
    capability=(8, 0),
    cores=108,
    memory=int(79.25 * _GIB),
    bandwidth=2.039e12,
    clock=1.41,
    l2=40 << 20,
    shared=164 << 10,
    threads=2048,
    link=32e9,
  ),
  "rtx-4090": Card(
    name="NVIDIA GeForce RTX 4090",
    capability=(8, 9),
    cores=128,
    memory=25_386_352_640,
    bandwidth=1.008e12,
    clock=2.52,
    l2=72 << 20,
    shared=100 << 10,
    threads=1536,
    link=32e9,
  ),
  "l4": Card(
    name="NVIDIA L4",
    capability=(8, 9),
    cores=58,
    memory=24_152_899_584,
    bandwidth=300e9,
    clock=2.04,
    l2=48 << 20,
    shared=100 << 10,
    threads=1536,
    link=32e9,
  ),
  "b200": Card(
    name="NVIDIA B200",
    capability=(10, 0),
    cores=148,
    memory=180_000_000_000,
    bandwidth=8e12,
    clock=1.965,
    l2=126 << 20,
    shared=228 << 10,
    threads=2048,
    link=64e9,
  ),
  "a100-40gb": Card(
    name="NVIDIA A100-SXM4-40GB",
    capability=(8, 0),
    cores=108,
    memory=int(39.45 * _GIB),
    bandwidth=1.555e12,
    clock=1.41,
    l2=40 << 20,
    shared=164 << 10,
    threads=2048,
    link=32e9,
  ),
  "rtx-5090": Card(
    name="NVIDIA GeForce RTX 5090",
    capability=(12, 0),
    cores=170,
    memory=int(31.36 * _GIB),
    bandwidth=1.792e12,
    clock=2.41,
    l2=96 << 20,
    shared=100 << 10,
    threads=1536,
    link=64e9,
  ),
  "rtx-3090": Card(
    name="NVIDIA GeForce RTX 3090",
    capability=(8, 6),
    cores=82,
    memory=int(23.69 * _GIB),
    bandwidth=936e9,
    clock=1.7,
    l2=6 << 20,
    shared=100 << 10,
    threads=1536,
    link=32e9,
  ),
  "rtx-a6000": Card(
    name="NVIDIA RTX A6000",
    capability=(8, 6),
    cores=84,
    memory=int(47.54 * _GIB),
    bandwidth=768e9,
    clock=1.8,
    l2=6 << 20,
    shared=100 << 10,
    threads=1536,
    link=32e9,
  ),
  "a10g": Card(
    name="NVIDIA A10G",
    capability=(8, 6),
    cores=80,
    memory=23_028 << 20,
    bandwidth=600e9,
    clock=1.71,
    l2=6 << 20,
    shared=100 << 10,
    threads=1536,
    link=32e9,
  ),
  "l40s": Card(
    name="NVIDIA L40S",
    capability=(8, 9),
    cores=142,
    memory=int(44.40 * _GIB),
    bandwidth=864e9,
    clock=2.52,
    l2=96 << 20,
    shared=100 << 10,
    threads=1536,
    link=32e9,
  ),
  "t4": Card(
    name="Tesla T4",
    capability=(7, 5),
    cores=40,
    memory=int(14.56 * _GIB),
    bandwidth=320e9,
    clock=1.59,
    l2=4 << 20,
    shared=64 << 10,
    threads=1024,
    link=16e9,
  ),
}

# Bytes of memory of a chip.
TPUS = {"v4": 32 * _GIB, "v5e": 16 * _GIB, "v5p": 95 * _GIB, "v6e": 32 * _GIB}
# What a card's driver, CUDA and its libraries hold beside a program's arrays. An assumption: it has
# not been measured by this project.
RESERVED = _GIB // 2
# What people call a card of which there are several, and the one that is meant.
_ALSO = {"a100": "a100-80gb", "a6000": "rtx-a6000", "a10": "a10g"}


class Known(NamedTuple):
  """A card, or a chip, by name."""

  name: str
  memory: int

  @property
  def usable(self) -> int:
    """Bytes that are left to arrays."""
    return self.memory - (RESERVED if self.name in CARDS else 0)

  def target_config(self) -> str:
    """As `Card.target_config`."""
    return CARDS[self.name].target_config()


def card_named(name: str) -> Known:
  """A card by its name, in any case and spelling.

  Raises:
    ValueError: for one that is not known, with the nearest.

  >>> card_named("RTX 4090").name
  'rtx-4090'
  """
  memory = {key: card.memory for key, card in CARDS.items()} | TPUS
  spelled = {_letters(key): key for key in memory} | {_letters(k): v for k, v in _ALSO.items()}
  asked = _letters(name) if isinstance(name, str) else ""
  found = spelled.get(asked) or spelled.get(f"rtx{asked}")
  if found is None:
    hint = did_you_mean(str(name).lower(), memory, cutoff=0.5)
    raise ValueError(f"`card` {name!r} is unknown.{hint} Known: {', '.join(memory)}.")
  return Known(found, memory[found])


def _letters(name: str) -> str:
  return re.sub(r"[^a-z0-9]|nvidia|geforce|tesla", "", name.lower())
