"""What is read from a compiled program is what the program does, with its loops counted out."""

import dataclasses
import math
import os
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from configs import gpt3
from gptjax import ahead, hlo, sharding
from gptjax.config import resolve
from tests import small

SHAPE = dataclasses.replace(
  small.SHAPE, n_layers=4, d_model=64, d_head=16, d_ff=256, context=64, vocab_size=512
)
ONE = dict.fromkeys(sharding.AXES, 1)


def compiled(function, *shapes):
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  # As users have it, not as the other tests do, for speed.
  old = 'xla_cpu_use_fusion_emitters'  # of JAX 0.10
  options = {old: True} if old in os.environ['XLA_FLAGS'] else {}
  return jax.jit(function).lower(*args).compile(options).as_text()


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


# As a TPU makes room, and brings what it soon wants onto the chip.
PREFETCH = """
HloModule prefetched

ENTRY %main (x: f32[4,8]) -> f32[1,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %room = f32[4,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %s = ((f32[4,8]{1,0}), f32[1,8]{1,0LAYOUT}, s32[]{:S(2)}) slice-start(%x), slice={[0:1], [0:8]}
  %d = f32[1,8]{1,0LAYOUT} slice-done(%s)
  ROOT %all = f32[1,8]{1,0LAYOUT} custom-call(%d), custom_call_target="ConcatBitcast"
}
"""


@pytest.mark.parametrize('layout, times', [('', 2), (':S(1)', 1)])
def test_memory_counts_of_a_slice_that_is_fetched_ahead_the_slice(layout, times):
  assert hlo.read(PREFETCH.replace('LAYOUT', layout), ONE).bytes == times * 4 * 8


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
@pytest.mark.parametrize('windows', [(None,), pytest.param((None,) * 5, marks=pytest.mark.slow)])
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
    c.bytes * n for c, n in costs.collectives.items() if c.kind in kinds and c.axes == axes
  )


GATHERS, SUMS = ('all-gather',), ('all-reduce', 'reduce-scatter')


def assert_are_those_of_theory(each, besides, shape, rows, itemsize):
  """On two devices along each of data, fsdp and tensor, with so many rows on each device.

  FSDP gathers each weight and scatters its gradient once a slice, and data sums all once a step;
  tensor exchanges the residual four times forward and four times backward in each layer.
  """
  D, F, L, N = shape.d_model, shape.d_ff, shape.context, shape.n_layers
  A, V = shape.n_heads * shape.d_head, shape.padded_vocab
  matrices, outside = N * (4 * D * A + 2 * D * F) // 2, (V // 2 + L) * D
  of_d = (N * 6 + 2) * D  # norms and biases on the residual
  biases = N * (3 * A + F) // 2
  residual = rows * L * D * itemsize
  assert sent(each, GATHERS, ('fsdp',)) == (matrices + outside + of_d) * itemsize
  # Besides, some sums for norms, of a few numbers each. Gradients are summed in f32.
  assert sent(each, SUMS, ('fsdp',)) == pytest.approx((matrices + outside + biases) * 4, abs=500)
  # A TPU may send bf16 into a sum in f32.
  both = sent(each, SUMS, ('fsdp', 'tensor'))
  assert min(abs(both - of_d * 4), abs(both - of_d * itemsize)) < 500
  whole = ((matrices + outside + of_d) // 2 + biases) * 4
  assert sent(besides, SUMS, ('data',)) == sent(each, SUMS, ('data',)) == whole
  assert sent(each, GATHERS, ('tensor',)) == (4 * N + 2) * residual
  assert sent(each, SUMS, ('tensor',)) == pytest.approx((4 * N + 2) * residual, rel=0.02)
  sums = {('data',), ('fsdp',), ('tensor',), ('data', 'fsdp'), ('fsdp', 'tensor')}
  moved = {(c.kind in SUMS, c.axes) for c in each.collectives}
  assert moved <= {(True, axes) for axes in sums} | {(False, ('fsdp',)), (False, ('tensor',))}
  return {'weights': (matrices + outside) * 4, 'residual': 4 * N * residual}


def test_collectives_are_those_of_theory():
  each, besides = step((2, 2, 2), (None,))
  assert_are_those_of_theory(each, besides, SHAPE, rows=1, itemsize=4)


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x4', 'h100:1x8'])
def test_collectives_of_a_real_machine_are_those_of_theory(topology):
  """And it scatters sums, where a CPU cuts its part out of the whole."""
  machine = small.machine_or_skip(topology)
  c = gpt3.get_config('125m')
  c.model.n_layers = 4
  c.mesh.fsdp = c.mesh.tensor = 2
  c.compute.remat, c.compute.loss_chunk = 'none', c.model.context
  run = resolve(c, machine.devices)
  mesh = run.make_mesh(machine.devices)
  text = ahead.compile_step(run, mesh).as_text()
  each, besides = (hlo.read(text, run.mesh, trips) for trips in (1, 0))
  least = assert_are_those_of_theory(each, besides, run.program.shape, rows=4, itemsize=2)
  assert sent(each, ('reduce-scatter',), ('fsdp',)) == least['weights']
  assert sent(each, ('reduce-scatter',), ('tensor',)) >= least['residual']


# As a TPU writes a gather beside which it computes: three fusions that pass it on.
CHAIN = """
HloModule chained

%start (p: bf16[4,8]) -> (bf16[4,8], bf16[4,16], u32[]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %g.1 = bf16[4,16]{1,0} GATHER
  ROOT %c.1 = (bf16[4,8]{1,0}, bf16[4,16]{1,0}, u32[]{:S(2)}) CALL(%g.1)="AsyncCollectiveStart"
}

%step (p: bf16[4,8], r: bf16[4,16], a: f32[8,8], b: f32[8,8]) -> (f32[8,8], bf16[4,16]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %r = bf16[4,16]{1,0} parameter(3)
  %a = f32[8,8]{1,0} parameter(1)
  %b = f32[8,8]{1,0} parameter(2)
  %g.2 = bf16[4,16]{1,0} GATHER
  %dot = f32[8,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %passed = (f32[8,8]{1,0}, bf16[4,16]{1,0}) tuple(%dot, %r)
}

%done (p: bf16[4,8], r: bf16[4,16]) -> bf16[4,16] {
  %p = bf16[4,8]{1,0} parameter(0)
  %r = bf16[4,16]{1,0} parameter(1)
  %g.3 = bf16[4,16]{1,0} GATHER
  ROOT %c.3 = bf16[4,16]{1,0} CALL(%p, %g.3, %r)="AsyncCollectiveDone"
}

ENTRY %main (x: bf16[4,8], a: f32[8,8]) -> bf16[4,16] {
  %x = bf16[4,8]{1,0} parameter(0)
  %a = f32[8,8]{1,0} parameter(1)
  %begun = (bf16[4,8]{1,0}, bf16[4,16]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%start
  %r = bf16[4,16]{1,0} get-tuple-element(%begun), index=1
  %product = (f32[8,8]{1,0}, bf16[4,16]{1,0}) fusion(%x, %a, %a, %r), kind=kOutput, calls=%step
  %s = bf16[4,16]{1,0} get-tuple-element(%product), index=1
  ROOT %gathered = bf16[4,16]{1,0} fusion(%x, %s), kind=kCustom, calls=%done
}
"""


def test_a_collective_that_goes_on_beside_work_counts_once():
  gather = 'all-gather(%p), channel_id=1, replica_groups=[4,2]<=[8], dimensions={1}, '
  text = CHAIN.replace('GATHER', gather + 'frontend_attributes={chain_id="0"}')
  text = re.sub(r'CALL(.*)=', r'custom-call\1, custom_call_target=', text)
  found = hlo.read(text, {'data': 4, 'tensor': 2})
  assert found.collectives == {hlo.Collective('all-gather', ('tensor',), 2, 2 * 4 * 8 * 2): 1}
  assert found.flops == 2 * 8 * 8 * 8
  # And its arrays once, and those of the product.
  assert found.bytes == 2 * (4 * 8 + 4 * 16) + 3 * 4 * 8 * 8


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
