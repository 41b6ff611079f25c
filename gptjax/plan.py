"""`python -m gptjax.plan --config=configs/gpt3.py:125m --topology=v5e:4x4` tells a run's cost.

It compiles the training step for a machine that need not be there, and tells what a device holds,
what it computes, moves and sends, and from that how long the run takes at best. Nothing is run.

  --topology=…   v4:2x2x2, v5e:4x4, v5p:4x4x8 (128 chips, which Google calls v5p-256),
                 v5p:4x4x8*2 (two slices), v6e:16x16, tpu7x:2x2x1 (4 chips, 8 devices),
                 h100:16x8 (16 nodes of 8), h200:…, a100:…
  --search=N     compiles for N meshes, with the microbatch and remat policy that seem to fit each,
                 and ranks them
  --json=FILE    the same figures for programs
  --save=FILE    the compiled step, which --config.compute.compiled=FILE runs on the machine itself
"""

import argparse
import contextlib
import copy
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator

import jax
from ml_collections import ConfigDict

from gptjax import ahead, compiler, cost, flags, machines, memory, plan_table, search, sharding
from gptjax.ahead import DoesNotFit
from gptjax.config import Run, check_knobs, resolve
from gptjax.cost import Plan
from gptjax.errors import Mistake, mistake, told_as
from gptjax.machines import Machine
from gptjax.search import Settings

AUTO = {'mesh.slow_axes': 'auto'}  # a mesh that is tried lies as it would by itself
OPTIONS = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
OPTIONS.add_argument('--topology', default='')
OPTIONS.add_argument('--search', default='0')
OPTIONS.add_argument('--json', type=os.path.expanduser, default='')
OPTIONS.add_argument('--save', type=os.path.expanduser, default='')


def main(config: ConfigDict, options: argparse.Namespace) -> None:
  """Prints the plan of a config; ends with code 1 if it does not fit."""
  for name in ('json', 'save'):
    check_file(f'--{name}', getattr(options, name))
  if not options.search.isdecimal():
    raise mistake('--search', options.search, 'how many meshes to compile for', '--search=4')
  check_knobs(config)
  compiler.fix_order(config.deterministic)
  jax.config.update('jax_platforms', 'cpu')  # whatever else is there only compiles
  machine = machines.find(options.topology)
  try:
    if int(options.search):
      plan = best(config, machine, int(options.search))
    else:
      run = resolve(config, machine.devices)
      say(f'compiling the step for {len(machine.devices)} × {machine.chip.kind} …')
      plan = cost.plan_for(run, machine)
  except DoesNotFit as e:
    found = {'topology': options.topology, 'fits': False, 'why': str(e)}
    end_without(config, machine, str(e), found, options)
  if not plan.fits:
    end_without(config, machine, plan_table.table(plan), plan_table.as_json(plan), options)
  print(plan_table.table(plan))
  if options.save:
    with told_as('--save', 'a file to write', 'another --save', OSError):
      size = ahead.save(options.save, plan.compiled, plan.run, plan.mesh)
    print(f'{options.save} holds the step, {size / 1e6:,.1f} MB')
  write_json(options.json, plan_table.as_json(plan))


def end_without(
  config: ConfigDict, machine: Machine, told: str, found: dict, options: argparse.Namespace
) -> None:
  """Says that a run does not fit, and with which settings it would."""
  print(told, flush=True)
  write_json(options.json, found)
  print(cure(config, machine))
  if options.save:
    print(f'{options.save} was not written')
  raise SystemExit(1)


def check_file(option: str, path: str) -> None:
  """Raises for a path that cannot be written, before anything is compiled."""
  folder = pathlib.Path(path).absolute().parent
  writable = folder.is_dir() and os.access(folder, os.W_OK)
  if path and (not writable or pathlib.Path(path).is_dir()):
    raise mistake(option, path, 'a file in a folder that can be written', f'another {option}')


def say(told: str) -> None:
  """Says what takes long, to those who watch."""
  print(told, file=sys.stderr, flush=True)


def write_json(path: str, found: dict) -> None:
  """Writes what was found, if there is a path."""
  if path:
    with told_as('--json', 'a file to write', 'another --json', OSError):
      pathlib.Path(path).write_text(json.dumps(found, indent=2) + '\n')


def best(config: ConfigDict, machine: Machine, count: int) -> Plan:
  """Compiles for so many meshes, prints them from the fastest on, and returns that one.

  The fastest is in the middle between its best case and that in which nothing overlaps.
  """
  say(f'compiling for {count} meshes, and for each with the first settings that fit it …')
  tell = lambda plan: say(plan_table.line(plan))
  meshes = itertools.islice(candidates(config, machine), count)
  found = [plan for runs in meshes if (plan := fitting(runs, machine, tell))]
  if not found:
    got, fix = f'no mesh that fits among the first {count}', 'a larger --search or --topology'
    raise DoesNotFit(*mistake('--search', got, 'one', fix).args)
  found.sort(key=lambda plan: sum(plan.run_seconds))
  print('\n'.join([plan_table.HEADS, *map(plan_table.line, found)]), end='\n\n')
  return found[0]


def cure(config: ConfigDict, machine: Machine, compiles: int = 3) -> str:
  """Settings with which it would fit, found by compiling a few: of its own mesh, or another."""
  known = lambda run: (run.mesh, run.microbatch, run.program.numerics.remat)
  own = []
  with contextlib.suppress(Mistake):  # a search asks nothing of the config's own mesh
    own.append(resolve(config, machine.devices))
  meshes = candidates(config, machine, *(run.mesh for run in own))
  tried = [known(run) for run in own]
  others = (run for run in itertools.chain.from_iterable(meshes) if known(run) not in tried)
  say(f'looking for settings with which it fits: up to {compiles} to compile …')
  plan = fitting(itertools.islice(others, compiles), machine)
  if not plan:
    return 'no mesh, microbatch or remat policy was found with which it fits'
  knobs = plan.settings.knobs()
  if config.mesh.slow_axes != AUTO['mesh.slow_axes']:
    knobs |= AUTO
  words = ' '.join(f'--config.{name}={value}' for name, value in knobs.items())
  return f'it would fit, with {plan.memory.held / 1e9:,.2f} GB held: {words}'


def fitting(
  runs: Iterable[Run], machine: Machine, tell: Callable[[Plan], None] = lambda plan: None
) -> Plan | None:
  """The plan of the first run that fits; `tell` hears of each that the compiler takes."""
  for run in runs:
    with contextlib.suppress(DoesNotFit):
      plan = cost.plan_for(run, machine)
      tell(plan)
      if plan.fits:
        return plan
  return None


def candidates(
  config: ConfigDict, machine: Machine, *first: dict[str, int]
) -> Iterator[Iterator[Run]]:
  """For each mesh worth compiling, and some before, the runs on it that seem to fit."""
  # The shape and the full batch are the same whatever mesh and microbatch the config has.
  alone = Settings(dict.fromkeys(sharding.AXES, 1), 1, 'full')
  run = changed(config, alone, machine.devices[:1])
  shape, batch = run.program.shape, run.slices
  meshes = search.meshes(shape, batch, machine.devices, machine.chip.usable)
  for mesh in itertools.chain(first, meshes):
    runs = (changed(config, s, machine.devices) for s in search.policies(batch, mesh))
    yield (run for run in runs if is_worth_it(run) and seems_to_fit(run, machine))


def changed(config: ConfigDict, settings: Settings, devices: list[jax.Device]) -> Run:
  """A config with other settings, checked."""
  other = copy.deepcopy(config)
  other.update_from_flattened_dict(settings.knobs() | AUTO)
  return resolve(other, devices)


def is_worth_it(run: Run) -> bool:
  """Whether nothing better is known: a loop that keeps all stacks it, and so moves more."""
  numerics = run.program.numerics
  return numerics.apart or numerics.remat != 'none'


def seems_to_fit(run: Run, machine: Machine) -> bool:
  """Whether what is known without compiling leaves some room."""
  mesh = run.make_mesh(machine.devices)
  return memory.at_least(run, mesh) < 0.9 * machine.chip.usable


if __name__ == '__main__':
  flags.run(main, __doc__, OPTIONS)
