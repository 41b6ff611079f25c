"""Any mesh, any slicing and any filler give the same step; and what it costs in collectives."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import attention, products
from tests import small

ROWS = 20  # of 24: the last slice is not full


def gradients(program, token_gbl, rows, start=0):
  params = small.init(program)['params']
  loss, grads = jax.jit(program.gradients)(params, small.put(token_gbl), start, rows)
  return float(loss), jax.tree.map(np.asarray, grads)


@pytest.fixture(scope='module')
def one_device():
  program = small.program(attend=attention.chunked)
  with small.on():
    return program, gradients(program, small.rows(3, 8), ROWS, start=7)


*FEWER, ALL = small.MESHES  # the last one splits along every axis


@pytest.mark.parametrize('mesh', [*(pytest.param(m, marks=pytest.mark.slow) for m in FEWER), ALL])
def test_any_mesh_gives_the_same_loss_and_gradients(one_device, mesh):
  program, want = one_device
  with small.on(*mesh):
    got = gradients(program, small.rows(3, 8), ROWS, start=7)
  small.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  'remat, mesh',
  [
    pytest.param('dots', (1, 1, 1), marks=pytest.mark.slow),
    ('none', ALL),
    pytest.param('none', (1, 1, 1), marks=pytest.mark.slow),
    pytest.param('dots', ALL, marks=pytest.mark.slow),
  ],
)
def test_products_of_bf16_on_a_cpu_give_nearly_the_same(one_device, remat, mesh):
  _, (want, want_grads) = one_device
  bf16 = {'dtype': jnp.dtype('bfloat16'), 'multiply': products.in_bf16, 'remat': remat}
  with small.on(*mesh):
    program = small.program(attend=attention.chunked, **bf16)
    got, grads = gradients(program, small.rows(3, 8), ROWS, start=7)
  assert 0 < abs(got - want) < 1e-3 * want
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
    assert a.dtype == np.float32
    assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b) + 1e-6


@pytest.mark.parametrize('b', [1, pytest.param(24, marks=pytest.mark.slow)])
def test_slices_of_any_size_are_one_batch(one_device, b):
  program, want = one_device
  with small.on():
    got = gradients(program, small.rows(3, 8).reshape(24 // b, b, -1), ROWS, start=7)
  small.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_dropout_is_the_same_on_any_mesh_in_any_slices(one_device):
  program, (undropped, _) = one_device
  program = dataclasses.replace(
    program, numerics=dataclasses.replace(program.numerics, dropout=0.3)
  )
  with small.on():
    want = gradients(program, small.rows(3, 8), ROWS, start=7)
    elsewhere, _ = gradients(program, small.rows(3, 8), ROWS, start=8)
  with small.on(2, 2, 2):
    got = gradients(program, small.rows(3, 8).reshape(6, 4, -1), ROWS, start=7)
  small.assert_close(got, want, rtol=1e-4, atol=1e-6)
  assert len({want[0], undropped, elsewhere}) == 3


def test_gradients_are_of_the_mean_loss_over_the_rows_that_count():
  program = small.program()
  token_gbl = small.rows(3, 8)
  with small.on():
    params = small.init(program)['params']
    rows = token_gbl.reshape(24, -1)[:ROWS]
    loss = lambda params: program.loss(params, jnp.asarray(rows), jnp.ones(ROWS))
    want = jax.jit(jax.value_and_grad(lambda p: loss(p) / (ROWS * 16)))(params)
    got = gradients(program, token_gbl, ROWS)
  small.assert_close(got, (float(want[0]), want[1]), rtol=1e-4, atol=1e-6)


def test_surplus_rows_weigh_nothing():
  program = small.program()
  token_gbl = small.rows(3, 8)
  other = token_gbl.reshape(24, -1).copy()
  other[ROWS:] = 0
  with small.on(2, 2, 2):
    params, step = small.init(program)['params'], jax.jit(program.gradients)
    run = lambda token_gbl, rows: jax.device_get(step(params, small.put(token_gbl), 0, rows))
    want = run(token_gbl, ROWS)
    got = run(other.reshape(token_gbl.shape), ROWS)
    fewer = run(token_gbl, ROWS - 1)
  assert got[0] == want[0]
  jax.tree.map(np.testing.assert_array_equal, got[1], want[1])
  assert fewer[0] != want[0]


def run(program, steps=4, rows=24):
  state, metrics = small.init(program), []
  step = jax.jit(program.train_step, donate_argnums=0)
  for i in range(steps):
    token_gbl = small.put(small.rows(3, 8))
    state, measured = step(state, token_gbl, i * rows, rows, 1e-2)
    metrics.append({name: float(value) for name, value in measured.items()})
  return state, metrics


@pytest.mark.slow
def test_any_mesh_trains_alike():
  program = small.program(attend=attention.chunked)
  with small.on():
    _, want = run(program)
  with small.on(2, 2, 2):
    _, got = run(program)
  for a, b in zip(got, want, strict=True):
    assert a == pytest.approx(b, rel=1e-4)
  assert want[-1]['loss'] < want[0]['loss']


def test_metrics_are_the_norms_they_say():
  program = small.program()
  with small.on():
    before = small.init(program)['params']
    grads = gradients(program, small.rows(3, 8), 24)[1]
    state, (metrics,) = run(program, steps=1)
  norm = lambda tree: np.sqrt(sum((np.float64(a) ** 2).sum() for a in jax.tree.leaves(tree)))
  after = state['params']
  update = jax.tree.map(lambda a, b: np.float64(a) - b, after, before)
  assert metrics['grad_norm'] == pytest.approx(norm(grads), rel=1e-4)
  assert metrics['update_norm'] == pytest.approx(norm(update), rel=1e-3)
  assert metrics['param_norm'] == pytest.approx(norm(after), rel=1e-4)


def test_padding_rows_stay_zero():
  with small.on():
    state, _ = run(small.program(), steps=2)
  assert (state['params']['embed'][small.SHAPE.vocab_size :] == 0).all()
  assert (state['params']['embed'][: small.SHAPE.vocab_size] != 0).all()


def test_bf16_keeps_state_and_gradients_in_f32():
  program = small.program(dtype=jnp.dtype('bfloat16'))
  with small.on():
    state, metrics = run(program, steps=2)
    grads = jax.eval_shape(program.gradients, state['params'], small.rows(3, 8), 0, 24)[1]
    _, exact = run(small.program(), steps=2)
  kinds = {a.dtype for a in jax.tree.leaves((state['params'], state['moments']['mu'], grads))}
  assert kinds == {np.dtype('float32')}
  assert metrics[1]['loss'] == pytest.approx(exact[1]['loss'], rel=2e-2)
  assert metrics[1]['loss'] != exact[1]['loss']


def group_size(line):
  """Devices in a group of a collective, in each of the ways that XLA writes groups."""
  if match := re.search(r'replica_groups=\{\{([\d,]*)\}', line):
    return len(match[1].split(','))
  if match := re.search(r'replica_groups=\[\d+,(\d+)\]', line):
    return int(match[1])
  sizes, named = re.search(r'replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}', line).groups()
  sizes = dict(re.findall(r"'(\w+)'=(\d+)", sizes))
  return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named))


def collectives(program, mesh):
  """(kind, devices in a group, whether in the loop over slices, elements) of a compiled step."""
  with small.on(*mesh):
    args = program.abstract_state(), small.put(small.rows(3, 8)), 0, 24, 0.1
    text = jax.jit(program.train_step).lower(*args).compile().as_text()
  pattern = r'= (.*?) (all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)\(.*'
  for match in re.finditer(pattern, text):
    shapes = re.findall(r'\w\d+\[([\d,]*)\]', match[1])
    elements = sum(math.prod(int(n) for n in dims.split(',') if n) for dims in shapes)
    in_loop = 'while/body' in re.search(r'op_name="([^"]*)"', match[0])[1]
    yield match[2], group_size(match[0]), in_loop, elements


def test_gradients_are_reduced_over_data_once_a_step():
  data, fsdp = 4, 2
  program = small.program(dtype=jnp.dtype('bfloat16'))
  found = list(collectives(program, (data, fsdp, 1)))
  with small.on(data, fsdp, 1):
    params = jax.tree.leaves(program.abstract_state()['params'])
  share = sum(math.prod(a.sharding.shard_shape(a.shape)) for a in params)
  sums = [c for c in found if c[0] in ('all-reduce', 'reduce-scatter') and c[3] > 64]
  # In every slice gradients cross fsdp only, as a reduce-scatter (on CPU: its all-reduce).
  assert {size for _, size, in_loop, _ in sums if in_loop} == {fsdp}
  # Over data they go once, after the loop, and each weight's own share of them only.
  after = [(size, elements) for _, size, in_loop, elements in sums if not in_loop]
  assert sum(elements for _, elements in after) == share and {size for size, _ in after} == {data}
  # Weights are gathered over fsdp and nothing is gathered over data.
  assert {size for kind, size, _, _ in found if kind == 'all-gather'} == {fsdp}
  assert not [kind for kind, *_ in found if kind in ('all-to-all', 'collective-permute')]


def test_evaluation_counts_its_rows_and_no_filler():
  program = small.program()
  token_gbl = small.rows(1, 8)
  with small.on():
    params = small.init(program)['params']
    evaluate = jax.jit(program.eval_step)
    first, rest = evaluate(params, token_gbl, 3), evaluate(params, token_gbl[:, 3:], 5)
    whole = evaluate(params, token_gbl, 8)
    mean, _ = jax.jit(program.gradients)(params, small.put(token_gbl), 0, 3)
  assert first + rest == pytest.approx(float(whole), rel=1e-5)
  assert first == pytest.approx(float(mean) * 3 * 16, rel=1e-5)
