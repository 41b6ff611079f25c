"""`python -m benchmarks.compiled`: what a TPU's compiler makes of the eight GPT-3 runs.

For each it compiles the training step for the machine and the first mesh of `benchmarks.plans`, one
sequence for each part of the mesh, and prints a table in Markdown: the FLOPs of the program, its
loops counted out, beside those of the model. What does not fit has half the layers, and all else
the same. Nothing is run. With `--lowered` nothing is compiled either: it tells how long it takes to
trace and lower each.
"""

import argparse
import time

import jax

from benchmarks import plans
from configs import gpt3
from gptjax import ahead, cost, machines, plan, search, sharding
from gptjax.ahead import DoesNotFit
from gptjax.cost import Plan
from gptjax.errors import mistake, told_plainly
from gptjax.machines import Machine
from gptjax.model import REMAT

HEAD = (
  '| run | layers | machine | stage·data·fsdp·tensor | remat | compiled / model FLOPs | GB held | '
  'GB moved | compiled in, s |\n|---|---|---|---|---|---|---|---|---|\n'
)


def compiled(a: argparse.Namespace, size: str, machine: Machine, remat: str) -> Plan:
  """The plan of a size with as many layers as fit."""
  c = gpt3.get_config(size)
  c.compute.layers = a.layers
  period = len(c.model.pattern)
  mesh = mesh_of(a, size, machine)
  while c.model.n_layers >= period:
    run = plan.changed(c, search.Settings(mesh, 1, remat), machine.devices)
    # A compiler refuses late: what is known before is asked first.
    made = _made(run, machine) if plan.seems_to_fit(run, machine) else None
    if made and made.fits:
      return made
    c.model.n_layers = c.model.n_layers // 2 // period * period
  got = f'{machine.topology}, too small for {period} layers of {size} with remat {remat}'
  raise mistake('--topology', got, 'memory for one period of layers', 'a larger one')


def _made(run, machine):
  try:
    return cost.plan_for(run, machine)
  except DoesNotFit:
    return None


def mesh_of(a: argparse.Namespace, size: str, machine: Machine) -> dict[str, int]:
  """That which is asked for, or the first that is worth compiling."""
  if a.mesh:
    return dict(zip(sharding.AXES, a.mesh, strict=True))
  settings = search.Settings(dict.fromkeys(sharding.AXES, 1), 1, 'full')
  run = plan.changed(gpt3.get_config(size), settings, machine.devices[:1])
  found = search.meshes(run.program.shape, run.slices, machine.devices, machine.chip.usable)
  return next(found)


def row(made: Plan, size: str) -> str:
  """A row of the table; bytes are of a slice."""
  run, settings = made.run, made.settings
  cells = (
    f'`{size}`',
    f'{run.program.shape.n_layers}',
    f'`{made.machine.topology}`',
    settings.shape,
    f'`{settings.remat}`',
    f'{made.step.flops / made.model_flops:.3f}',
    f'{made.memory.held / 1e9:.1f} of {made.memory.there / 1e9:.1f}',
    f'{made.each.bytes / 1e9:,.1f}',
    f'{made.compile_seconds:.0f}',
  )
  return '| ' + ' | '.join(cells) + ' |\n'


def lowered(a: argparse.Namespace, size: str, machine: Machine, remat: str) -> str:
  """How long it takes to trace and lower the step of a size, in a line."""
  c = gpt3.get_config(size)
  c.compute.layers = a.layers
  run = plan.changed(c, search.Settings(mesh_of(a, size, machine), 1, remat), machine.devices)
  mesh = run.make_mesh(machine.devices)
  with jax.set_mesh(mesh):
    step, arguments = ahead.jitted(run, mesh), ahead.abstract_arguments(run)
    start = time.perf_counter()
    lines = step.lower(*arguments).as_text().count('\n')
    took = time.perf_counter() - start
  return f'{size:6}{run.program.shape.n_layers:4} layers, {remat:7}{took:8.2f} s{lines:8,} lines'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--sizes', nargs='+', choices=plans.MACHINES, default=[*plans.MACHINES])
  parser.add_argument('--topology', help='the machine of all, as gptjax.plan takes it')
  parser.add_argument('--mesh', nargs=4, type=int, metavar='N', help='of stage data fsdp tensor')
  parser.add_argument('--remat', nargs='+', choices=REMAT, default=['none', 'full'])
  parser.add_argument('--layers', choices=('auto', 'loop', 'apart'), default='auto')
  parser.add_argument('--lowered', action='store_true', help='only trace and lower')
  a = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  head = HEAD
  for size in a.sizes:
    machine = machines.find(a.topology or plans.MACHINES[size][0])
    for remat in a.remat:
      if a.lowered:
        print(lowered(a, size, machine, remat), flush=True)
        continue
      print(head + row(compiled(a, size, machine, remat), size), end='', flush=True)
      head = ''


if __name__ == '__main__':
  with told_plainly():
    main()
