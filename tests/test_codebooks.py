"""Codebooks: what the codes mean, and that encoding finds the right one."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem
from conftest import GOLDEN
from optax_lowmem._quantization.array import encode, encode_finite
from optax_lowmem._quantization.codebooks import _CODEBOOKS, get_codebook

NEAREST = ["dynamic", "dynamic_unsigned", "nf4", "fp4"]


@pytest.mark.parametrize("name", _CODEBOOKS)
def test_every_value_encodes_to_itself(name):
  book = get_codebook(name)
  assert book.values.shape == (2**book.bits,)
  again = book.decode(book.encode(jnp.asarray(book.values)))
  np.testing.assert_array_equal(again, book.values)


@pytest.mark.parametrize("name", _CODEBOOKS)
def test_holds_the_ends_and_zero(name):
  book = get_codebook(name)
  assert 1.0 in book.values
  assert (0.0 in book.values) == (name not in ("log8_unsigned", "log4_unsigned"))
  if book.signed and name != "dynamic":
    assert -1.0 in book.values


@pytest.mark.parametrize("name", NEAREST)
def test_finds_the_nearest_value_at_every_threshold(name):
  """Encoding is monotone, so agreeing on both sides of each midpoint is agreeing everywhere."""
  book = get_codebook(name)
  values = np.unique(book.values).astype(np.float64)
  middle = (values[1:] + values[:-1]) / 2
  down = up = middle.astype(np.float32)
  x: Any = [down]
  for _ in range(4):
    down, up = np.nextafter(down, np.float32(-2)), np.nextafter(up, np.float32(2))
    x += [down, up]
  x = np.concatenate([*x, values.astype(np.float32)]).clip(values[0], 1)
  expected = values[np.searchsorted(middle, x.astype(np.float64))]
  for find in (book.encode, jax.jit(book.encode)):
    np.testing.assert_array_equal(book.values[np.asarray(find(x))], expected.astype(np.float32))


@pytest.mark.parametrize(
  ("name", "step", "fine", "coarser", "reach"),
  [
    ("log8", 1 / 32, 2, 4, 9),
    ("log8_unsigned", 1 / 32, 6, 8, 21),
    ("log4", 1 / 2, 2, 2, 4),
    ("log4_unsigned", 1 / 2, 4, 2, 11),
  ],
)
def test_log_codes_have_the_same_relative_error_at_every_magnitude(
  name, step, fine, coarser, reach
):
  book: Any = get_codebook(name)
  for octave in range(reach):
    x = np.exp2(np.random.default_rng(0).uniform(-octave - 1, -octave, 4096)).astype(np.float32)
    error = np.abs(np.asarray(book.decode(book.encode(jnp.asarray(x)))) / x - 1)
    # Codes are widest apart at the foot of an octave. The nearest is half a step off at most,
    # a dithered one a whole step.
    worst = step * (1 if octave < fine else coarser) * (1.0 if book.dithered else 0.5)
    assert error.max() <= worst * 1.001
    assert 0.2 * worst < error.mean() < 0.6 * worst


@pytest.mark.parametrize("name", ["log8_unsigned", "log4_unsigned"])
def test_dithered_codes_have_the_right_mean(name):
  book = get_codebook(name)
  low, high = np.sort(book.values)[-3:-1]
  for part in (0.1, 0.5, 0.9):
    x = np.float32(low + (high - low) * (part + np.linspace(-0.05, 0.05, 100_000)))
    y = book.values[np.asarray(book.encode(jnp.asarray(x)))]
    assert set(y.tolist()) == {float(low), float(high)}
    np.testing.assert_allclose((y == high).mean(), part, atol=0.01)


def test_dithering_keeps_a_slow_average_moving():
  """Of each block one element has gradients, the others fall by 0.1 % a step."""
  book = get_codebook("log8_unsigned")
  nearest = dataclasses.replace(book, dithered=False)
  x = jnp.exp2(-5 * jax.random.uniform(jax.random.key(0), (64, 64))).at[:, 0].set(2.0)

  def fall(book):
    def step(stored, key):
      squares = 2.0 * jax.random.normal(key, (64,)) ** 2
      v = (0.999 * stored.dequantize()).at[:, 0].add(0.001 * squares)
      return encode(v, book, (64,)), None

    stored, _ = jax.lax.scan(
      step, encode(x, book, (64,)), jax.random.split(jax.random.key(1), 1000)
    )
    return jnp.log(stored.dequantize() / x)[:, 1:]

  # The nearest code never leaves its place: elements move only as the scale does.
  assert fall(nearest).mean() > -0.1
  ours = fall(book)
  np.testing.assert_allclose(ours.mean(), 1000 * np.log(0.999), rtol=0.05)
  assert ours.std() < 0.25


POWER = ["power8", "power8_unsigned", "power4", "power4_unsigned"]


@pytest.mark.parametrize("name", POWER)
def test_power_codes_are_what_they_say_and_the_nearest(name):
  book: Any = get_codebook(name)
  top = 2 ** (book.bits - book.signed) - 1
  t = np.arange(top + 1) / top
  values = (1 - book.fourth) * t**2 + book.fourth * t**4
  np.testing.assert_allclose(book.values[: top + 1], values, rtol=5e-7)
  x = np.random.default_rng(0).uniform(0, 1, 100_000).astype(np.float32) ** 6
  below = np.searchsorted(values, x, side="right").clip(1, top) - 1
  nearest = below + (x - values[below] > np.diff(values)[below] / 2)
  nearest = nearest if book.signed else np.maximum(nearest, x > 0)
  found = np.asarray(jax.jit(book.encode)(jnp.asarray(x)))
  assert np.mean(found != nearest) < 1e-4  # float32's midpoints


@pytest.mark.parametrize("name", POWER)
def test_only_what_hardly_moves_is_rounded_at_random(name):
  """And then with the right mean; the rest is rounded to the nearest."""
  book: Any = get_codebook(name)
  low, high = book.values[5:7]
  gap = high - low
  for part in (0.1, 0.5, 0.9):
    x = jnp.float32(low + gap * (part + np.linspace(-0.05, 0.05, 100_000)))
    near, far = (
      (x + sign * 0.99 * book.still * gap for sign in (1, -1)),
      x + book.still * gap * 1.01,
    )
    for old in near:
      codes = np.asarray(book.encode_blocks(x, jnp.float32(1), old))
      assert set(codes.tolist()) == {5, 6}
      np.testing.assert_allclose((codes == 6).mean(), part, atol=0.01)
    codes = book.encode_blocks(x, jnp.float32(1), far)
    np.testing.assert_array_equal(codes, book.encode(x))


@pytest.mark.parametrize("name", POWER)
def test_what_is_stored_does_not_move_by_itself(name):
  """Stored, loaded and stored again: no code is rounded at random, whatever the scale."""
  book = get_codebook(name)
  scales = np.exp2(np.random.default_rng(0).uniform(-60, 100, (2000, 1))).astype(np.float32)
  once = encode_finite(jnp.asarray(book.values * scales), book, (2**book.bits,))
  x = once.dequantize()
  again = jax.jit(lambda x: encode_finite(x, book, (2**book.bits,), x))(x)
  np.testing.assert_array_equal(again.codes, once.codes)
  np.testing.assert_array_equal(again.scales, scales)


@pytest.mark.parametrize("name", POWER)
@pytest.mark.parametrize("exponent", [-30, 7, 40])
def test_a_power_of_two_turns_no_code(name, exponent):
  """Also of those that are rounded at random."""
  book = get_codebook(name)
  x = jnp.abs(jax.random.normal(jax.random.key(0), (512, 64)))
  once = encode_finite(x, book, (64,), x)
  assert np.mean(once.codes != encode_finite(x, book, (64,)).codes) > 0.1
  factor = jnp.float32(2.0**exponent)
  again = encode_finite(x * factor, book, (64,), x * factor)
  np.testing.assert_array_equal(again.codes, once.codes)
  np.testing.assert_array_equal(again.scales, once.scales * factor)


@pytest.mark.parametrize("name", POWER)
@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_a_slow_average_follows(name, decay):
  """Towards 0.4 of its block's largest, from far below and from above, where nearest stands still.

  What it averages is noisy, as gradients are: of equal values the hash is equal.
  """
  book = get_codebook(name)
  start = jnp.concatenate([jnp.linspace(0.05, 0.2, 32), jnp.linspace(0.6, 0.9, 31), jnp.ones(1)])
  target = jnp.full(64, 0.4).at[-1].set(1.0)
  first = encode_finite(jnp.broadcast_to(start, (256, 64)), book, (64,))
  steps = round(2 / (1 - decay))

  @jax.jit
  def run():
    def step(stored, key):
      old = stored.dequantize()
      new = target * (1 + 0.3 * jax.random.normal(key, (256, 64)))
      return encode_finite(decay * old + (1 - decay) * new, book, (64,), old), None

    return jax.lax.scan(step, first, jax.random.split(jax.random.key(0), steps))[0]

  expected = target + (first.dequantize()[0] - target) * decay**steps
  found = run().dequantize()[:, :-1].mean(0)
  # Measured: 0.02, 0.15.
  np.testing.assert_allclose(found, expected[:-1], rtol=0.05 if book.bits == 8 else 0.25)


@pytest.mark.parametrize("name", ["power8_unsigned", "power4_unsigned", "log8_unsigned"])
def test_unsigned_codes_never_make_zero_of_a_positive_value(name):
  book = get_codebook(name)
  x = np.array([2e-38, 1e-30, 1e-20, 1e-10, 1e-5, 1.0], np.float32)
  assert (np.asarray(book.decode(book.encode(jnp.asarray(x)))) > 0).all()


@pytest.mark.parametrize("name", _CODEBOOKS)
def test_encoding_is_monotone(name):
  book = get_codebook(name)
  if getattr(book, "dithered", False):
    book = dataclasses.replace(book, dithered=False)
  x: Any = np.linspace(-1 if book.signed else 0, 1, 20_001, dtype=np.float32)
  assert (np.diff(book.values[np.asarray(book.encode(x))]) >= 0).all()


def test_maps_are_those_of_bitsandbytes():
  golden = np.load(GOLDEN / "a_blockwise.npz")
  np.testing.assert_array_equal(get_codebook("dynamic").values, golden["map/signed"])
  np.testing.assert_array_equal(get_codebook("dynamic_unsigned").values, golden["map/unsigned"])
  four = np.load(GOLDEN / "b_4bit.npz")
  np.testing.assert_array_equal(get_codebook("nf4").values, four["code/nf4"])
  np.testing.assert_array_equal(get_codebook("fp4").values, four["code/fp4"])


def test_an_unknown_name_is_answered_with_the_nearest():
  with pytest.raises(ValueError, match=r"`codebook` 'dynamik' is unknown. Did you mean 'dynamic'"):
    get_codebook("dynamik")
  with pytest.raises(ValueError, match="Known: dynamic, dynamic_unsigned, fp4"):
    get_codebook("zzz")


# Codebooks of one's own ---------------------------------------------------------------------------


class Even(lowmem.Codebook):
  """Evenly spaced values in so many bits."""

  @property
  def _steps(self):
    return 2 ** (self.bits - self.signed) - 1

  def encode(self, r):
    codes = jnp.round(r * self._steps)
    return (codes + (self._steps + 1) * self.signed).astype(jnp.uint8)

  def decode(self, codes):
    return (codes.astype(jnp.float32) - (self._steps + 1) * self.signed) / self._steps


WRONG: Any = (8, "even", True)


@dataclasses.dataclass(frozen=True)
class Listed(Even):
  values_too: tuple | list = ()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("signed", [True, False])
def test_a_codebook_of_ones_own_works(bits, signed):
  book = Even("even", bits, signed)
  values = np.unique(np.abs(book.values) if not signed else book.values)
  x = jnp.asarray(np.resize(values, (8, 64))).at[:, 0].set(1.0)
  q: Any
  for q in (lowmem.quantize(x, book, 64), lowmem.Blockwise(book, 64, 0).store(x)):
    chex.assert_trees_all_close(q.dequantize(), x, atol=2 / 2**bits)
  tx = lowmem.quantized(optax.sgd(0.1, momentum=0.9), storage={"trace": book})
  params = {"w": jnp.ones((64, 128))}
  state: Any = tx.init(params)
  assert state[0].trace["w"].codebook == book
  updates, state = jax.jit(tx.update)(params, state, params)
  np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-6)
  np.testing.assert_allclose(state[0].trace["w"].dequantize(), 1.0, rtol=1e-6)
  assert [e.method for e in lowmem.explain(tx, params)] == ["phases"]


@pytest.mark.parametrize(
  ("book", "exception", "message"),
  [
    (lambda: Even("power8", 8, True), ValueError, "'power8' has the name of another"),
    (lambda: Even("even", 6, True), ValueError, "'even' must have 8 or 4 bits, got 6"),
    (lambda: Even("a/b", 8, True), ValueError, "must have a name of letters.*got 'a/b'"),
    (lambda: Even("", 8, True), ValueError, "must have a name of letters"),
    (lambda: Even(*WRONG), ValueError, "must have 8 or 4 bits, got 'even'"),
    (lambda: Listed("even", 8, True, []), TypeError, "must be hashable.*sequences in it tuples"),
    (lambda: Even, ValueError, "is unknown"),
  ],
)
def test_a_codebook_that_no_state_can_hold_is_refused(book, exception, message):
  x = jnp.ones((64, 128))
  for use in (
    lambda book: lowmem.quantize(x, book),
    lowmem.Blockwise,
    lambda book: lowmem.quantized(optax.adam(1e-3), storage={"mu": lowmem.Blockwise(book)}),
  ):
    with pytest.raises(exception, match=message):
      use(book())


def test_a_copy_of_a_known_codebook_is_known():
  book = dataclasses.replace(get_codebook("power8"))
  assert lowmem.Blockwise(book) == lowmem.Blockwise("power8")
