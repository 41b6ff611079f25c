"""What a compiled training step costs on any machine: FLOPs, memory, collectives, length.

Speed itself depends on the machine and is measured in `benchmarks/`. These do not, and a change
that makes a step slower mostly shows in one of them.
"""

import dataclasses

import jax
import numpy as np
import pytest

from gptjax import attention, hlo, products
from tests import small

SHAPE = dataclasses.replace(
  small.SHAPE, n_layers=4, d_model=64, d_head=16, d_ff=256, context=256, windows=(None, 32)
)
B = 8
MESHES = {
  'one device': {},
  'data·fsdp·tensor': {'data': 2, 'fsdp': 2, 'tensor': 2},
  'stage·fsdp': {'stage': 2, 'fsdp': 2},
}
# Of a step of two slices: MFLOP of its products, MB that it holds besides its arguments, and how
# often each device exchanges along which axes.
RECORDED = {
  'one device': (8280.6, 52.26, {}),
  'data·fsdp·tensor': (
    1035.1,
    7.26,
    {
      'all-gather fsdp': 160,
      'all-gather tensor': 52,
      'all-reduce data': 1,
      'all-reduce data·fsdp': 2,
      'all-reduce fsdp': 10,
      'all-reduce fsdp·tensor': 6,
      'all-reduce tensor': 64,
    },
  ),
  'stage·fsdp': (
    5246.6,
    20.08,
    {
      'all-gather fsdp': 118,
      'all-reduce fsdp': 6,
      'all-reduce stage': 62,
      'all-reduce stage·fsdp': 2,
      'all-to-all stage': 2,
      'collective-permute stage': 8,
    },
  ),
}
CHANGED = """the compiled step is not what it was; it costs now
{}
If that is meant, write it into RECORDED in tests/test_budget.py, and say what it buys."""


def compiled(shape=SHAPE, **numerics):
  program = small.program(shape, loss_chunk=64, attend=attention.chunked, remat='dots', **numerics)
  state = program.abstract_state()
  like = small.put(np.zeros((2, B, shape.context + 1), 'uint16'))
  token_gbl = jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=like.sharding)
  step = jax.jit(program.train_step, donate_argnums=0)
  return step.lower(state, token_gbl, 0, 2 * B, np.float32(1e-3))


def costs(mesh):
  with small.on(**mesh):
    step = compiled().compile()
  sizes = dict.fromkeys(('stage', 'data', 'fsdp', 'tensor'), 1) | mesh
  found = hlo.read(step.as_text(), sizes, 2 + 2 * (sizes['stage'] - 1))
  exchanged = {}
  for each, count in found.collectives.items():
    name = f'{each.kind} {"·".join(each.axes)}'
    exchanged[name] = exchanged.get(name, 0) + count
  held = step.memory_analysis().temp_size_in_bytes
  return found.flops / 1e6, held / 1e6, dict(sorted(exchanged.items()))


@pytest.mark.skipif(not jax.__version__.startswith('0.10.'), reason='recorded with JAX 0.10')
@pytest.mark.parametrize(
  'name',
  [pytest.param(name, marks=pytest.mark.slow) if 'stage' in name else name for name in MESHES],
)
def test_a_step_costs_what_it_did(name):
  flops, held, exchanged = costs(MESHES[name])
  now = f'  {name!r}: ({flops:.1f}, {held:.2f}, {exchanged}),'
  assert name in RECORDED, CHANGED.format(now)
  # What XLA fuses may depend on the processor, and so what it holds, by a little.
  before = (pytest.approx(RECORDED[name][0], rel=1e-3), pytest.approx(RECORDED[name][1], rel=0.1))
  assert (flops, held, exchanged) == (*before, RECORDED[name][2]), CHANGED.format(now)


@pytest.mark.parametrize('multiply', [products.plainly, products.in_bf16], ids=lambda m: m.__name__)
def test_a_deeper_model_is_no_longer_program(multiply):
  """So tracing and compiling take as long for 96 layers as for 4."""
  deep = dataclasses.replace(SHAPE, n_layers=96)
  with small.on():
    lines = [
      len(compiled(shape, multiply=multiply).as_text().splitlines()) for shape in (SHAPE, deep)
    ]
  assert lines[0] > 100 and lines == pytest.approx([lines[0]] * 2, rel=0.01)
