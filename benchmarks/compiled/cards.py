"""Cards as XLA's GPU compiler wants them described. Figures are those of the data sheets."""

from __future__ import annotations

import dataclasses

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Card:
  """One kind of GPU.

  Attributes:
    name: as its driver calls it.
    capability: CUDA's compute capability.
    cores: multiprocessors.
    memory: bytes of device memory.
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


CARDS = {
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
    memory=80 * _GIB,
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
}
