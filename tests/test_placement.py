"""Where state rests: a placement is what an array's sharding and its type say alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from optax_lowmem._host_memory.pages import fetch, store, store_as
from optax_lowmem._host_memory.placement import DEVICE, PINNED_HOST, PLACEMENTS, placement_of

every = pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda p: p.kind)


@every
def test_types_and_shardings_name_the_same_memory(placement):
  seen = []

  def traced(x):
    seen.append(placement_of(x))
    return placement.put(x)

  for x in (placement.put(jnp.ones(8)), jax.jit(traced)(placement.put(jnp.ones(8)))):
    assert placement.is_of(x.sharding) and placement.holds(x) and placement_of(x) == placement
  assert seen == [placement]


def test_no_two_share_a_type():
  """Or a step under `jax.jit` would put what rests in one into the other."""
  assert len({placement.space for placement in PLACEMENTS}) == len(PLACEMENTS)


@every
@pytest.mark.parametrize("axis", [None, 0])
def test_a_page_goes_where_the_one_before_it_was(placement, axis):
  x = jnp.arange(256.0 * 4).reshape(256, 4)
  new = jax.jit(lambda page: store_as(fetch(page) + 1, page))(store(x, axis, placement))
  assert {placement_of(lane) for lane in new.lanes} == {placement}
  np.testing.assert_array_equal(fetch(new), x + 1)


def test_unpinned_host_memory_is_device_memory_to_types():
  """Why it is no placement: jax has no type for it. Where this fails, it can be one."""
  kinds = {memory.kind for memory in jax.devices()[0].addressable_memories()}
  if "unpinned_host" not in kinds:
    pytest.skip("this backend has no unpinned host memory")
  where = SingleDeviceSharding(jax.devices()[0], memory_kind="unpinned_host")
  x = jax.device_put(jnp.ones(8), where)
  assert DEVICE.holds(x) and not DEVICE.is_of(x.sharding) and not PINNED_HOST.holds(x)
