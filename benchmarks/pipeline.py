"""`python -m benchmarks.pipeline`: how long the stages of a pipeline wait, and what they hold.

On CPU devices it measures the gradient of a batch of more and more slices: each takes a tick, and
what is taken besides, in ticks, is the bubble, which the formula says is 2 (S - 1) whatever the
slices. With `--aot=v5p:2x2x2` or `--aot=h100:1x8` it compiles for a machine that need not be there,
and prints what a device holds besides inputs and outputs: for 1F1B, and for GPipe by
differentiating the forward pipeline.
"""

import argparse
import os

# Before JAX is imported; more devices than cores is enough to count ticks.
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.train_step import seconds
from configs import gpt3
from gptjax import machines, sharding
from gptjax.config import Run, resolve
from gptjax.errors import told_plainly
from gptjax.model import REMAT
from gptjax.step import Batch, Program

SLICES = (2, 4, 8, 16, 32)


def run_of(a: argparse.Namespace, devices) -> Run:
  """The model to cut into stages, and its mesh."""
  c = gpt3.get_config()
  D = a.width
  c.model.update(n_layers=a.layers, d_model=D, n_heads=D // 64, d_head=64, d_ff=4 * D)
  c.model.update(context=a.context, window=a.context // 8, vocab_size=a.vocab)
  c.train_tokens = 1e9  # short contexts would make too many sequences of 300e9
  c.mesh.stage, c.mesh.fsdp = a.stages, a.fsdp
  c.batch.sequences, c.batch.ramp_tokens = max(SLICES) * a.fsdp, 0.0
  c.compute.update(microbatch=1, remat=a.remat, loss_chunk=a.context)
  return resolve(c, devices)


def lowered(program: Program, schedule: str, slices: int, rows: int):
  """The gradient of a batch of so many slices, on the mesh that is set, not yet compiled."""
  params = program.abstract_state()['params']
  layout = jax.NamedSharding(jax.sharding.get_mesh(), sharding.computed('gbl'))
  shape = (slices, rows, program.shape.context + 1)
  token_gbl = jax.ShapeDtypeStruct(shape, jnp.uint16, sharding=layout)
  if schedule == '1f1b':
    run = lambda params, token_gbl, count: program.gradients(params, token_gbl, 0, count)
    return jax.jit(run).lower(params, token_gbl, np.int32(slices * rows))

  def loss(params, token_gbl):
    return program.forward_loss(params, Batch(token_gbl, 0, slices * rows), slices)

  return jax.jit(jax.value_and_grad(loss)).lower(params, token_gbl)


def memory(a: argparse.Namespace, program: Program) -> None:
  """Prints the compiled memory of both schedules."""
  print(f'{"slices":>8}{"1F1B MB":>12}{"GPipe MB":>12}')
  for slices in SLICES[::2]:
    print(f'{slices:8}', end='', flush=True)
    for schedule in ('1f1b', 'gpipe'):
      compiled = lowered(program, schedule, slices, a.fsdp).compile()
      held = compiled.memory_analysis().temp_size_in_bytes
      print(f'{held / 1e6:12,.0f}', end='', flush=True)
    print()


def bubble(a: argparse.Namespace, program: Program) -> None:
  """Prints the time of a batch by its slices, and the ticks that are lost in each."""
  params = jax.jit(lambda: program.init(jax.random.key(0)))()['params']
  most = max(SLICES)
  random = np.random.default_rng(0)
  shape = (most, a.fsdp, a.context + 1)
  token_gbl = random.integers(0, a.vocab, shape).astype(np.uint16)
  token_gbl = jax.device_put(token_gbl, sharding.computed('gbl'))
  run = jax.jit(program.gradients)
  took = []
  print(f'{"slices":>8}{"s":>12}')
  for slices in SLICES:
    rows = np.int32(slices * a.fsdp)
    took.append(seconds(lambda: run(params, token_gbl, 0, rows), a.repeats))  # noqa: B023
    print(f'{slices:8}{took[-1]:12.3f}', flush=True)
  tick, rest = np.polyfit(SLICES, took, 1)
  S = a.stages
  print(f'a tick {tick:.3f} s; besides {rest / tick:.1f} ticks a batch, formula {2 * (S - 1)}')
  assert run._cache_size() == 1


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--aot', default='', help='compile for this machine, run nothing')
  parser.add_argument('--stages', type=int, default=4)
  parser.add_argument('--fsdp', type=int, default=1)
  parser.add_argument('--layers', type=int, default=8)
  parser.add_argument('--width', type=int, default=256)
  parser.add_argument('--context', type=int, default=256)
  parser.add_argument('--vocab', type=int, default=4096)
  parser.add_argument('--remat', choices=REMAT, default='full')
  parser.add_argument('--repeats', type=int, default=3)
  a = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  devices = machines.find(a.aot).devices if a.aot else jax.devices()
  devices = devices[: a.stages * a.fsdp]
  run = run_of(a, devices)
  program = run.program
  print(
    f'{program.shape.n_params:,} parameters, {a.stages} stages × {a.fsdp} fsdp, '
    f'{a.fsdp} × {a.context} tokens a slice, {program.numerics.dtype.name}, '
    f'remat {a.remat}, on {devices[0].device_kind}'
  )
  with jax.set_mesh(run.make_mesh(devices)):
    (memory if a.aot else bubble)(a, program)


if __name__ == '__main__':
  with told_plainly():
    main()
