"""A pipeline is the model without one: the loss, every gradient, dropout, evaluation, training."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks import pipeline
from gptjax import attention, kernels, products
from gptjax.step import Batch
from tests import small

SHAPE = dataclasses.replace(small.SHAPE, n_layers=16)  # eight periods
SLICES, B = 6, 4
# stage, data, fsdp, tensor
SLOW = pytest.mark.slow
MESHES = [
  (4, 2, 1, 1),
  pytest.param((2, 1, 2, 2), marks=SLOW),
  pytest.param((8, 1, 1, 1), marks=SLOW),
  pytest.param((2, 1, 1, 1), marks=SLOW),
  pytest.param((2, 2, 1, 2), marks=SLOW),
]
# Of 6 slices of 4: as many slices as two stages, fewer than one slice, more than all stages, some
# that are no multiple of the stages, and slices that are not full.
ROWS = [8, 3, 24, 20, 9]


def on(stage, data, fsdp, tensor):
  return small.on(data, fsdp, tensor, stage=stage)


def program(**numerics):
  return small.program(SHAPE, **{'attend': attention.chunked, 'dropout': 0.2} | numerics)


def measured(program, rows_of_each=ROWS, start=7):
  """Loss, gradients and held-out loss by rows; one compilation of each serves all."""
  with_gradients, evaluate = jax.jit(program.gradients), jax.jit(program.eval_step)
  params = small.init(program)['params']
  token_gbl = small.put(small.rows(SLICES, B))
  found = {}
  for rows in rows_of_each:
    found[rows] = jax.device_get(
      (*with_gradients(params, token_gbl, start, rows), evaluate(params, token_gbl, rows))
    )
  assert with_gradients._cache_size() == evaluate._cache_size() == 1
  return found


@pytest.fixture(scope='module')
def without():
  with small.on():
    return measured(program())


@pytest.mark.parametrize('mesh', MESHES)
def test_1f1b_is_the_model_without_a_pipeline(without, mesh):
  with on(*mesh):
    found = measured(program())
  for rows in ROWS:
    small.assert_close(found[rows], without[rows], rtol=1e-4, atol=1e-6)


@SLOW
def test_products_of_bf16_on_a_cpu_are_the_same_in_stages():
  how = {'dtype': jnp.dtype('bfloat16'), 'multiply': products.in_bf16}
  with on(1, 1, 1, 1):
    want = measured(program(**how))
  with on(*MESHES[0]):
    found = measured(program(**how))
  for rows in ROWS:
    small.assert_close(found[rows], want[rows], rtol=2e-2, atol=1e-3)


# As many slices as stages, fewer, and more that are no multiple of them.
@SLOW
@pytest.mark.parametrize(
  'mesh, slices',
  [
    ((4, 2, 1, 1), 2),
    ((2, 1, 1, 1), 2),
    ((2, 1, 2, 2), 5),
    ((2, 2, 1, 2), 5),
    ((4, 2, 1, 1), 6),
    ((8, 1, 1, 1), 5),
  ],
)
def test_gpipe_is_1f1b(mesh, slices):
  """The schedule that JAX differentiates itself, against the one whose gradient is made by hand."""
  undropped = program(dropout=0.0)
  with on(*mesh):
    params = small.init(undropped)['params']
    batch = lambda token_gbl: Batch(token_gbl, 0, slices * B)
    loss = lambda params, token_gbl: undropped.forward_loss(params, batch(token_gbl), slices)
    token_gbl = small.put(small.rows(SLICES, B))
    total, grads = jax.jit(jax.value_and_grad(loss))(params, token_gbl)
    tokens = slices * B * SHAPE.context
    got = jax.device_get((total / tokens, jax.tree.map(lambda g: g / tokens, grads)))
    want = jax.device_get(jax.jit(undropped.gradients)(params, token_gbl, 0, slices * B))
  small.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_vocabulary_that_stages_do_not_divide():
  """Of 256 padded rows each of three stages has 86, and what fills them up changes nothing."""
  shape = dataclasses.replace(SHAPE, n_layers=6, d_model=24)
  cut = lambda: small.program(shape, attend=attention.chunked)
  token_gbl = small.rows(4, 2)

  def run():
    state = small.init(cut())
    step = jax.jit(cut().train_step)
    for start in (0, 8):
      state, metrics = step(state, small.put(token_gbl), start, 8, 1e-2)
    return jax.device_get((state['params'], metrics))

  with small.on():
    want = run()
  with small.on(stage=3):
    got = run()
  small.assert_close(got, want, rtol=2e-3, atol=1e-4)
  assert got[0]['embed'].shape == (256, 24) and not got[0]['embed'][250:].any()


@pytest.mark.slow
def test_splash_runs_inside_the_stages():
  shape = dataclasses.replace(SHAPE, n_layers=4, d_head=64, context=128)
  token_gbl = small.rows(3, 2, shape=shape)

  def run(attend):
    cut = small.program(shape, attend=attend, remat='full')
    params = small.init(cut)['params']
    return jax.device_get(jax.jit(cut.gradients)(params, small.put(token_gbl), 0, 6))

  with small.on(tensor=2, stage=2):
    got = run(kernels.make_splash('TPU v5', True))
    want = run(attention.reference)
  small.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_stages_meet_once_a_tick_and_weights_stay_where_they_are():
  cut = program(dropout=0.0)
  with on(4, 2, 1, 1):
    args = cut.abstract_state()['params'], small.put(small.rows(SLICES, B)), 0, 24
    text = jax.jit(cut.gradients).lower(*args).compile().as_text()
  pattern = r'(?:all-\w+|reduce-scatter|collective-permute)\(.*op_name="([^"]*)"'
  found = re.findall(pattern, text)
  # Nothing in the loop over a stage's layers, forward or backward; chunks of the loss are another.
  assert not [name for name in found if 'vmap' in name]
  passed = [name for name in found if 'ppermute' in name]
  assert len(passed) == 2 and all(name.count('while/body') == 1 for name in passed)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_memory_does_not_grow_with_the_slices(dtype):
  """1F1B keeps as many inputs as it has stages for, and GPipe one for every slice."""
  cut = program(dropout=0.0, dtype=jnp.dtype(dtype), remat='full')

  def held(slices, schedule):
    compiled = pipeline.lowered(cut, schedule, slices, B).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  with on(4, 2, 1, 1):
    few, many = held(4, '1f1b'), held(24, '1f1b')
    input_bytes = B // 2 * SHAPE.context * SHAPE.d_model * jnp.dtype(dtype).itemsize
    assert many - few < input_bytes
    if dtype == 'bfloat16':
      assert held(24, 'gpipe') - held(4, 'gpipe') >= 20 * input_bytes
