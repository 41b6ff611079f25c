"""A model that reads in parts what it has not forgotten is the model that reads all at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import cache, sharding
from gptjax.step import to_read
from tests import small

T = small.SHAPE.context
TOKENS = np.random.default_rng(0).integers(0, 250, (2, T)).astype('int32')
PARTS = [[4] * 4, [1] * 16, [7, 1, 1, 7], [16]]


def shape_of(windows):
  return dataclasses.replace(small.SHAPE, windows=windows)


def read(program, params, token_bt, parts, first_b, positions=T, platform='cpu'):
  """Logits after each part [b, v], with rows that begin in those columns."""
  program, params = to_read(program, dict(params), platform)
  step = jax.jit(program.read)
  known = cache.empty(
    program.shape, jax.device_put(first_b, sharding.computed('b')), jnp.float32, positions
  )
  ends = np.cumsum(parts)
  for start, end in zip(ends - parts, ends, strict=True):
    part_bl = jax.device_put(token_bt[:, start:end], sharding.computed('bl'))
    logit_vb, known = step(params, part_bl, known)
    yield end, np.asarray(logit_vb)[:250].T


def at_once(program, params):
  logit_blv = jax.jit(program.logits)(params, jax.device_put(TOKENS, sharding.computed('bl')))
  return np.asarray(logit_blv)[..., :250]


def loud(program):
  """Params with opinions, biases too."""
  random = np.random.default_rng(1)
  like = program.abstract_state()['params']
  draw = lambda a: jax.device_put(random.normal(0, 0.3, a.shape).astype('f'), a.sharding)
  return jax.tree.map(draw, like)


@pytest.mark.parametrize(
  'windows',
  [(None, 5), *(pytest.param(w, marks=pytest.mark.slow) for w in ((None,), (5,), (3, None, 7)))],
)
@pytest.mark.parametrize('parts', PARTS, ids=str)
def test_reading_in_parts_is_reading_at_once(windows, parts):
  program = small.program(shape_of(windows))
  with small.on():
    params = loud(program)
    want = at_once(program, params)
    for end, got in read(
      program,
      params,
      TOKENS,
      parts,
      np.zeros(2, 'int32'),
    ):
      np.testing.assert_allclose(got, want[:, end - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('parts', PARTS, ids=str)
def test_a_row_that_begins_later_is_that_row_alone(parts):
  program = small.program()
  first_b = np.array([0, 6], 'int32')
  shifted = TOKENS.copy()
  shifted[1, 6:] = TOKENS[1, :-6]
  shifted[1, :6] = 249  # never looked at
  with small.on():
    params = loud(program)
    want = at_once(program, params)
    for end, got in read(program, params, shifted, parts, first_b):
      np.testing.assert_allclose(got[0], want[0, end - 1], rtol=1e-4, atol=1e-4)
      if end > 6:
        np.testing.assert_allclose(got[1], want[1, end - 7], rtol=1e-4, atol=1e-4)
      assert np.isfinite(got).all()


@pytest.mark.parametrize(
  'mesh',
  [
    {'fsdp': 2, 'tensor': 2},
    {'tensor': 4},
    pytest.param({'tensor': 2}, marks=pytest.mark.slow),
    pytest.param({'data': 2}, marks=pytest.mark.slow),
  ],
)
def test_any_mesh_reads_the_same(mesh):
  program = small.program()
  with small.on():
    params = jax.tree.map(np.asarray, loud(program))
    want = at_once(program, params)
  with small.on(**mesh):
    like = program.abstract_state()['params']
    laid = jax.tree.map(lambda a, like: jax.device_put(a, like.sharding), params, like)
    for end, got in read(
      program,
      laid,
      TOKENS,
      [8, 1, 1, 4, 1, 1],
      np.zeros(2, 'int32'),
    ):
      np.testing.assert_allclose(got, want[:, end - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_as_other_machines_multiply_it_reads_the_same():
  program = small.program()
  with small.on(tensor=2):
    params, none = loud(program), np.zeros(2, 'int32')
    want = at_once(program, params)
    for end, got in read(program, params, TOKENS, [8, 1, 1, 6], none, platform='gpu'):
      np.testing.assert_allclose(got, want[:, end - 1], rtol=1e-4, atol=1e-4)


def test_a_layer_keeps_no_more_than_its_window():
  program = small.program(shape_of((None, 5, 40)))
  with small.on():
    known = cache.empty(program.shape, jnp.zeros(2, jnp.int32), jnp.float32, T)
    less = cache.empty(program.shape, jnp.zeros(2, jnp.int32), jnp.float32, 4)
  sizes = lambda known: [k_msk.shape[1] for k_msk, _ in known.layers]
  assert sizes(known) == [T, 5, T] and sizes(less) == [4, 4, 4]


def test_a_cache_of_fewer_positions_serves_rows_that_get_no_more():
  program = small.program()
  with small.on():
    params = loud(program)
    want = at_once(program, params)
    first_b = np.array([2, 2], 'int32')
    shifted = np.concatenate([np.zeros((2, 2), 'int32'), TOKENS], 1)
    parts = [4, 4, 1, 1]
    for end, got in read(
      program,
      params,
      shifted,
      parts,
      first_b,
      positions=8,
    ):
      np.testing.assert_allclose(got, want[:, end - 3], rtol=1e-4, atol=1e-4)


def test_rows_that_are_taken_go_on_as_they_were():
  program = small.program()
  with small.on():
    program, params = to_read(program, loud(program), 'cpu')
    step = jax.jit(program.read)
    known = cache.empty(program.shape, jnp.array([0, 3]), jnp.float32, T)
    _, known = step(params, TOKENS[:, :8], known)
    straight, _ = step(
      params, TOKENS[[1, 1], 8:9], jax.jit(cache.Cache.take)(known, jnp.array([1, 1]))
    )
    want, _ = step(params, TOKENS[:, 8:9], known)
  np.testing.assert_allclose(straight[:, 0], want[:, 1], rtol=1e-5)
  np.testing.assert_allclose(straight[:, 1], want[:, 1], rtol=1e-5)
