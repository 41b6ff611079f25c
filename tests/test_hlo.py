"""What is read from a compiled program is what the program does, with its loops counted out."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from gptjax import hlo, sharding
from tests import small

SHAPE = dataclasses.replace(
  small.SHAPE, n_layers=4, d_model=64, d_head=16, d_ff=256, context=64, vocab_size=512
)
ONE = dict.fromkeys(sharding.AXES, 1)


def compiled(function, *shapes):
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(function).lower(*args).compile().as_text()


def test_a_loop_counts_as_often_as_it_runs():
  def looped(x, w):
    return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=7)[0]

  def unrolled(x, w):
    for _ in range(7):
      x = jnp.tanh(x @ w)
    return x

  got, want = (hlo.read(compiled(f, (32, 48), (48, 48)), ONE) for f in (looped, unrolled))
  assert got.flops == want.flops == 7 * 2 * 32 * 48 * 48


def test_a_loop_of_unknown_length_counts_as_told():
  def sums(x, w, n):
    inner = lambda x, _: (x @ w, None)
    turn = lambda _, x: lax.scan(inner, x, length=3)[0]
    return lax.fori_loop(0, n.astype(jnp.int32), turn, x) @ w

  text = compiled(sums, (8, 16), (16, 16), ())
  product = 2 * 8 * 16 * 16
  for trips in (0, 1, 5):
    assert hlo.read(text, ONE, trips).flops == (3 * trips + 1) * product


def test_memory_counts_of_a_slice_what_is_sliced():
  """A scan over stacked weights reads each of them once, and writes each of its outputs once."""
  n, D = 50, 64

  def layers(x, w):
    return lax.scan(lambda x, w: (x * w, jnp.sin(x)), x, w)

  moved = hlo.read(compiled(layers, (D, D), (n, D, D)), ONE).bytes
  array = 4 * D * D
  # Besides, a CPU copies x in each turn, and fills the outputs with zeros first.
  assert moved == pytest.approx((4 + 1 + 2 + 1) * n * array, rel=0.01)


def step(mesh, windows, remat='none'):
  """The costs of a training step of three slices, at one trip of its loop and at none."""
  shape = dataclasses.replace(SHAPE, windows=windows)
  program = small.program(shape, remat=remat, loss_chunk=shape.context)
  with small.on(*mesh):
    args = program.abstract_state(), small.put(small.rows(3, 4, shape=shape)), 0, 12, 0.1
    text = jax.jit(program.train_step).lower(*args).compile().as_text()
  sizes = dict(zip(sharding.AXES, (1, *mesh), strict=True))
  return [hlo.read(text, sizes, trips) for trips in (1, 0)]


# Five windows for four layers leave no whole period to scan: the layers stand one by one.
@pytest.mark.parametrize('windows', [(None,), (None,) * 5])
def test_flops_of_a_step_are_those_of_the_formula(windows):
  L, A = SHAPE.context, SHAPE.n_heads * SHAPE.d_head
  plain = dataclasses.replace(SHAPE, windows=windows)
  # The reference computes all scores, and the formula counts those that are seen.
  unseen = 3 * 4 * A * SHAPE.n_layers * (L - plain.keys_seen(None))
  want = 4 * L * (plain.train_flops + unseen)
  for mesh in ((1, 1, 1), (2, 2, 2)):
    each, besides = step(mesh, windows)
    # Biases are summed and spread by products too, which the formula leaves out.
    assert each.flops * math.prod(mesh) == pytest.approx(want, rel=5e-3)
    assert besides.flops == 0


def test_rematerialisation_is_seen():
  none, full = (step((1, 1, 1), (None,), remat)[0].flops for remat in ('none', 'full'))
  D, A, L = SHAPE.d_model, SHAPE.n_heads * SHAPE.d_head, SHAPE.context
  # All products of a layer but its last, whose result nobody wants.
  again = 2 * 4 * D * A + 2 * 2 * A * L + 2 * D * SHAPE.d_ff
  assert full - none == 4 * L * SHAPE.n_layers * again


def sent(costs, kinds, axes):
  return sum(
    c.bytes * n for c, n in costs.collectives.items() if (c.kind in kinds, c.axes) == (True, axes)
  )


def test_collectives_are_those_of_theory():
  """FSDP gathers each weight and scatters its gradient once a slice, and data sums all once a step;
  tensor exchanges the residual four times forward and four times backward in each layer."""
  each, besides = step((2, 2, 2), (None,))
  # XLA may gather what is in no layer before the loop, or in it.
  D, F, L, N = SHAPE.d_model, SHAPE.d_ff, SHAPE.context, SHAPE.n_layers
  A, V = SHAPE.n_heads * SHAPE.d_head, SHAPE.padded_vocab
  f32, tensor, residual = 4, 2, 4 * L * D  # one row on each device
  matrices = N * (4 * D * A + 2 * D * F) // tensor * f32
  of_d = (N * 6 + 2) * D * f32  # norms and biases on the residual
  outside = (V // tensor + L) * D * f32
  sums = ('all-reduce', 'reduce-scatter')  # a CPU scatters a sum by cutting it
  assert sent(each, ('all-gather',), ('fsdp',)) == matrices + outside + of_d
  biases = N * (3 * A + F) // tensor * f32
  # Besides, some sums for norms, of a few numbers each.
  assert sent(each, sums, ('fsdp',)) == pytest.approx(matrices + outside + biases, abs=500)
  assert sent(each, sums, ('fsdp', 'tensor')) == of_d
  whole = (matrices + outside + of_d) // 2 + biases
  assert sent(besides, sums, ('data',)) == sent(each, sums, ('data',)) == whole
  assert sent(each, ('all-gather',), ('tensor',)) == (4 * N + 2) * residual
  assert sent(each, sums, ('tensor',)) == pytest.approx((4 * N + 2) * residual, rel=0.02)
  moved = {(c.kind in sums, c.axes) for c in each.collectives}
  assert moved <= {
    (False, ('fsdp',)),
    (False, ('tensor',)),
    (True, ('fsdp',)),
    (True, ('tensor',)),
    (True, ('data',)),
    (True, ('data', 'fsdp')),
    (True, ('fsdp', 'tensor')),
  }


@pytest.mark.parametrize(
  'text, want',
  [
    ('replica_groups={{0,2},{1,3}}', [0, 2]),
    ('replica_groups=[2,4]<=[8]', [0, 1, 2, 3]),
    ('replica_groups=[2,4]<=[4,2]T(1,0)', [0, 2, 4, 6]),
    ("replica_groups=mesh['a'=4,'b'=2] {'b'}", [0, 1]),
    ("replica_groups=mesh['a'=4,'b'=2,'c'=1] {'a'}", [0, 2, 4, 6]),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [0, 2, 4, 6]),
    ('source_target_pairs={{0,4},{4,0}}', [0, 4]),
    ('replica_groups={}', None),
  ],
)
def test_groups_of_devices_are_read_however_they_are_written(text, want):
  assert hlo.group(text) == want


def test_what_is_no_program_is_told():
  with pytest.raises(ValueError, match='not the text of a compiled program'):
    hlo.read('HloModule empty', ONE)
  with pytest.raises(ValueError, match='written otherwise'):
    hlo.group('replica_groups=somehow')
