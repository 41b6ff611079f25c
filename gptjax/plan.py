"""`python -m gptjax.plan --config=configs/gpt3.py:125m --topology=v5e:4x4` tells a run's cost.

It compiles the training step for a machine that need not be there, and tells what a device holds,
what it computes, moves and sends, and from that how long the run takes at best. Nothing is run.

  --topology=…   v4:2x2x2, v5e:4x4, v5p:4x4x8 (128 chips, which Google calls v5p-256),
                 v5p:4x4x8*2 (two slices), v6e:16x16, tpu7x:2x2x1 (4 chips, 8 devices),
                 h100:16x8 (16 nodes of 8), h200:…, a100:…
  --search=N     compiles for N meshes, with the microbatch and remat policy that seem to fit each,
                 and ranks them
  --json=FILE    the same figures for programs
"""

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import math
import pathlib
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gptjax import estimate, flags, hlo, machines, metrics, search, sharding, summary
from gptjax.config import Run, resolve
from gptjax.data import dataset
from gptjax.errors import Mistake, mistake, told_as
from gptjax.estimate import Seconds, Work
from gptjax.machines import Chip

OPTIONS = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
OPTIONS.add_argument('--topology', default='')
OPTIONS.add_argument('--search', type=int, default=0)
OPTIONS.add_argument('--json', default='')
# Of a GPU's memory JAX takes so much (launch/gpu.sh); a TPU's is its compiler's to fill.
USABLE = {'gpu': 0.9, 'tpu': 1.0, 'cpu': 1.0}


class DoesNotFit(Mistake):
  """The compiler refuses a program that wants more memory than there is."""


@dataclasses.dataclass(frozen=True)
class Memory:
  """What a device holds while it trains, in bytes."""

  parameters: int
  optimizer: int
  gradients: int
  activations: int  # kept for the backward pass of a slice
  temporaries: int  # all else that the compiler keeps
  program: int
  there: int

  @property
  def held(self) -> int:
    return sum(dataclasses.astuple(self)[:-1])


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is known of a run before its machine is there; of one device, if not said otherwise."""

  topology: str
  devices: int
  chip: Chip
  run: Run
  order: list[int]  # the ids of the devices, as they lie in the mesh
  compile_seconds: float
  memory: Memory
  besides: Work  # of a step besides its slices
  each: Work  # of each slice, or turn of a pipeline

  @property
  def fits(self) -> bool:
    return self.memory.held <= self.memory.there

  @property
  def turns(self) -> int:
    """Turns of a pipeline in a step besides its slices."""
    return 2 * (self.run.mesh['stage'] - 1)

  @property
  def idle(self) -> float:
    """Of a pipeline's turns in a step of the full batch."""
    return self.turns / (self.run.slices + self.turns)

  @property
  def filler(self) -> float:
    """Of the rows that the run computes, those that only fill up slices."""
    computed, surplus = self.run.ramp.slots(self.run.microbatch)
    return surplus / computed

  @property
  def settings(self) -> search.Settings:
    mesh = self.run.mesh
    rows = self.run.microbatch // (mesh['data'] * mesh['fsdp'])
    return search.Settings(mesh, rows, self.run.program.numerics.remat)

  @property
  def step(self) -> Work:
    """Of a full batch."""
    return self.besides.plus(self.each, self.run.slices + self.turns)

  def seconds(self, done: Work) -> Seconds:
    return estimate.seconds(done, self.chip, self.run.mesh, self.run.across)

  @property
  def model_flops(self) -> float:
    """What the formula says a device computes in a step of the full batch, nothing twice."""
    shape = self.run.program.shape
    tokens = self.run.slices * self.run.microbatch * shape.context
    return shape.train_flops * tokens / self.devices

  @property
  def peak(self) -> float:
    return metrics.peak_flops(self.chip.kind)

  def mfu(self, seconds: float) -> float:
    """Of a step of the full batch that takes so long."""
    return self.model_flops / seconds / self.peak

  @property
  def run_seconds(self) -> tuple[float, float]:
    """Of the whole run, at best and if nothing overlaps."""
    run, besides, each = self.run, self.seconds(self.besides), self.seconds(self.each)
    return estimate.run_seconds(run.ramp, run.microbatch, self.turns, besides, each)


def main(config: ConfigDict, options: argparse.Namespace) -> None:
  """Prints the plan of a config; ends with code 1 if it does not fit."""
  if options.json and not pathlib.Path(options.json).absolute().parent.is_dir():
    raise mistake('--json', options.json, 'a file in a folder that is there', 'another --json')
  try:
    if options.search:
      plan = best(config, options.topology, options.search)
    else:
      plan = make(config, options.topology)
  except DoesNotFit as e:
    print(e)
    write_json(options.json, {'topology': options.topology, 'fits': False, 'why': str(e)})
    print(cure(config, options.topology))
    raise SystemExit(1) from e
  print(table(plan))
  write_json(options.json, as_json(plan))
  if not plan.fits:
    print(cure(config, options.topology))
    raise SystemExit(1)


def write_json(path: str, found: dict) -> None:
  """Writes what was found, if there is a path."""
  if path:
    with told_as('--json', 'a file to write', 'another --json', OSError):
      pathlib.Path(path).write_text(json.dumps(found, indent=2) + '\n')


def make(config: ConfigDict, topology: str) -> Plan:
  """Compiles the training step of a config for a topology, and reads what came of it."""
  devices = devices_of(topology)
  return plan_for(resolve(config, devices), devices, machines.chip(topology), topology)


def devices_of(topology: str) -> list[jax.Device]:
  """Those of a machine, with JAX itself on the CPU."""
  machines.check(topology)
  jax.config.update('jax_platforms', 'cpu')
  return machines.devices(topology)


def best(config: ConfigDict, topology: str, count: int) -> Plan:
  """Compiles for so many meshes, prints a line for each, and returns the fastest that fits."""
  devices, chip = devices_of(topology), machines.chip(topology)
  shape, batch, there = *_model(config, devices), usable(chip, devices)
  found = []
  print(HEADS)
  for mesh in itertools.islice(search.meshes(shape, batch, devices, there), count):
    for settings in search.policies(batch, mesh):
      made = _with(config, settings, devices)
      if not seems_to_fit(made, devices, there):
        continue
      with contextlib.suppress(DoesNotFit):
        plan = plan_for(made, devices, chip, topology)
        print(line(plan), flush=True)
        if plan.fits:
          found.append(plan)
          break
  if not found:
    raise mistake('--search', 'no mesh that fits', 'one', 'a larger --topology')
  print()
  return min(found, key=lambda plan: sum(plan.run_seconds))


def cure(config: ConfigDict, topology: str, compiles: int = 3) -> str:
  """Settings with which it would fit, found by compiling a few: of its own mesh, or another."""
  devices, chip = devices_of(topology), machines.chip(topology)
  shape, batch, there = *_model(config, devices), usable(chip, devices)
  meshes = [resolve(config, devices).mesh, *search.meshes(shape, batch, devices, there)]
  for settings in itertools.chain.from_iterable(search.policies(batch, mesh) for mesh in meshes):
    made = _with(config, settings, devices)
    if not seems_to_fit(made, devices, there):
      continue
    if not compiles:
      break
    compiles -= 1
    with contextlib.suppress(DoesNotFit):
      plan = plan_for(made, devices, chip, topology)
      if plan.fits:
        knobs = ' '.join(f'--config.{name}={value}' for name, value in settings.knobs().items())
        return f'it would fit, with {plan.memory.held / 1e9:,.2f} GB held: {knobs}'
  return 'no mesh, microbatch or remat policy was found with which it fits'


def _model(config, devices):
  """The shape and the full batch, whatever mesh and microbatch the config has."""
  alone = search.Settings(dict.fromkeys(sharding.AXES, 1), 1, 'full')
  run = _with(config, alone, devices[:1])
  return run.program.shape, run.slices


def _with(config, settings, devices) -> Run:
  changed = copy.deepcopy(config)
  changed.update_from_flattened_dict(settings.knobs() | {'mesh.slow_axes': 'auto'})
  return resolve(changed, devices)


def seems_to_fit(run: Run, devices: Sequence[jax.Device], there: int) -> bool:
  """What is known without compiling: the state, its gradients, and what is kept of a slice."""
  mesh = sharding.make_mesh(**run.mesh, devices=devices, across=run.across)
  with jax.set_mesh(mesh):
    state = run.program.abstract_state()
    held = _bytes(state) + _bytes(state['params']) + kept_activations(run)
  return held < 0.9 * there


HEADS = (
  'stage·data·fsdp·tensor  microbatch  remat  memory GB   s a step, at best … without overlap'
  '    days'
)


def line(plan: Plan) -> str:
  """A plan in a line, under HEADS."""
  settings, step, held = plan.settings, plan.seconds(plan.step), plan.memory.held / 1e9
  least, most = (seconds / 86400 for seconds in plan.run_seconds)
  fits = '' if plan.fits else '  does not fit'
  return (
    f'{settings.shape:22}  {settings.microbatch:10}  {settings.remat:5}  {held:9.1f}  '
    f'{step.least:17.3f} … {step.most:<15.3f}  {least:6.1f} … {most:<6.1f}{fits}'
  )


def plan_for(run: Run, devices: Sequence[jax.Device], chip: Chip, topology: str) -> Plan:
  """The same for a config that was checked."""
  if run.across and chip.slow is None:
    wanted = 'a chip for which that is published'
    raise mistake('--topology', f'{topology}, slices over an unknown network', wanted, 'one slice')
  mesh = sharding.make_mesh(**run.mesh, devices=devices, across=run.across)
  start = time.perf_counter()
  with refusals_told():
    compiled = compile_step(run, mesh)
  took = time.perf_counter() - start
  text, shape = compiled.as_text(), run.program.shape
  rows = run.microbatch / (run.mesh['data'] * run.mesh['fsdp'])
  # In a pipeline each stage runs its own layers only; the others' are not in its program.
  done = lambda trips: estimate.work(
    hlo.read(text, run.mesh, trips), shape, rows, run.mesh['tensor']
  )
  besides, once = done(0), done(1)
  return Plan(
    topology=topology,
    devices=len(devices),
    chip=chip,
    run=run,
    order=[device.id for device in mesh.devices.flat],
    compile_seconds=took,
    memory=memory(run, mesh, compiled, usable(chip, devices)),
    besides=besides,
    each=once.plus(besides, -1),
  )


def usable(chip: Chip, devices: Sequence[jax.Device]) -> int:
  """Bytes that a run may hold on each device."""
  return int(chip.memory * USABLE[devices[0].platform])


@contextlib.contextmanager
def refusals_told() -> Iterator[None]:
  """Turns what a compiler refuses into a Mistake: too little memory, or its own words."""
  try:
    yield
  except jax.errors.JaxRuntimeError as e:
    if sizes := estimate.out_of_memory(str(e)):
      used, there = (f'{size / 1e9:,.2f} GB' for size in sizes)
      over = f'{(sizes[0] - sizes[1]) / 1e9:,.2f} GB too much'
      raise DoesNotFit(f'memory of a device: {used} wanted, {there} there: {over}') from e
    words = '\n'.join(line[:200] for line in str(e).splitlines()[:8])
    fix = 'another topology or mesh, or compute.attention=chunked'
    raise mistake('the compiler', f'its refusal: {words}', 'a program', fix) from e


def compile_step(run: Run, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
  """The step that `train` runs, for the devices of a mesh."""
  program = run.program
  with jax.set_mesh(mesh):
    tokens = dataset.features(program.shape.context, program.shape.vocab_size)['tokens']
    shape = run.slices, run.microbatch, *tokens.shape
    token_gbl = jax.ShapeDtypeStruct(shape, tokens.np_dtype, sharding=_layout('gbl'))
    scalars = [jax.ShapeDtypeStruct((), kind) for kind in (np.int32, np.int32, np.float32)]
    step = jax.jit(program.train_step, donate_argnums=0)
    return step.lower(program.abstract_state(), token_gbl, *scalars).compile()


def memory(run: Run, mesh: jax.sharding.Mesh, compiled: jax.stages.Compiled, there: int) -> Memory:
  """What a device holds, of which the first parts follow from the state's layout."""
  stats = compiled.memory_analysis()
  with jax.set_mesh(mesh):
    state = run.program.abstract_state()
    activations = kept_activations(run)
  parameters, moments = _bytes(state['params']), _bytes(state['moments'])
  held = (
    stats.argument_size_in_bytes
    + stats.output_size_in_bytes
    - stats.alias_size_in_bytes
    + stats.temp_size_in_bytes
  )
  # A gradient is summed in f32 where its parameter lies.
  gradients = parameters
  rest = held - parameters - moments - gradients
  activations = min(activations, rest)
  return Memory(
    parameters=parameters,
    optimizer=moments,
    gradients=gradients,
    activations=activations,
    temporaries=rest - activations,
    program=stats.generated_code_size_in_bytes,
    there=there,
  )


def kept_activations(run: Run) -> int:
  """Bytes on each device that the forward pass of a slice leaves for the backward pass.

  In a pipeline these are the inputs that each stage keeps: its layers run again.
  """
  program, shape = run.program, run.program.shape
  if run.mesh['stage'] > 1:
    size, dtype = (run.microbatch, shape.context, shape.d_model), program.numerics.dtype
    one = jax.ShapeDtypeStruct(size, dtype, sharding=_layout('btd'))
    return _bytes(one) * (2 * run.mesh['stage'] - 1)
  params = program.abstract_state()['params']
  token_bl = jax.ShapeDtypeStruct(
    (run.microbatch, shape.context + 1), np.int32, sharding=_layout('bl')
  )
  weight_b = jax.ShapeDtypeStruct((run.microbatch,), np.float32, sharding=_layout('b'))

  def residuals(params, token_bl, weight_b):
    loss = lambda params: program.loss(params, token_bl, weight_b)
    return jax.tree.leaves(jax.vjp(loss, sharding.defer(params))[1])

  made = jax.make_jaxpr(residuals)(params, token_bl, weight_b).jaxpr
  given = {*made.invars, *made.constvars}
  new = {v for v in made.outvars if not isinstance(v, jax.extend.core.Literal)} - given
  return _bytes([v.aval for v in new])


def _layout(dims):
  return jax.NamedSharding(jax.sharding.get_mesh(), sharding.computed(dims))


def _bytes(tree) -> int:
  """Bytes of abstract arrays on each device."""
  share = lambda a: math.prod(a.sharding.shard_shape(a.shape)) * jnp.dtype(a.dtype).itemsize
  return sum(share(a) for a in jax.tree.leaves(tree))


def table(plan: Plan) -> str:
  """A plan for people."""
  run, shape, m = plan.run, plan.run.program.shape, plan.memory
  step = plan.seconds(plan.step)
  least, most = plan.run_seconds
  tokens = run.ramp.total * shape.context
  gb = lambda size: f'{size / 1e9:12,.2f} GB'
  mesh = ' · '.join(f'{axis} {size}' for axis, size in run.mesh.items())
  lines = [
    f'{plan.topology}: {plan.devices} × {plan.chip.kind}; {mesh}',
    f'{shape.n_params:,} parameters; {run.slices} slices of {run.microbatch} sequences; '
    f'{run.program.numerics.dtype.name}, remat {run.program.numerics.remat}, '
    f'attention {run.program.numerics.attend.__name__}; compiled in {plan.compile_seconds:.0f} s',
    *(f'{name:8} {told}' for name, told in summary.links(run, plan.order).items()),
    '',
    'Memory of a device',
  ]
  for field in dataclasses.fields(Memory)[:-1]:
    lines.append(f'  {field.name:14}{gb(getattr(m, field.name))}')
  left = m.there - m.held
  share = f' ({m.there / plan.chip.memory:.0%} of all)' * (m.there < plan.chip.memory)
  fits = f'fits, with {left / 1e9:,.2f} GB left' if left >= 0 else f'{-left / 1e9:,.2f} GB too much'
  lines += [f'  {"together":14}{gb(m.held)} of {m.there / 1e9:,.2f} GB{share}: {fits}', '']
  ratio = plan.step.flops / plan.model_flops
  lines += [
    f'A step of {run.slices * run.microbatch:,} sequences, on each device',
    f'  model          {plan.model_flops / 1e12:12,.1f} TFLOP',
    f'  compiled       {plan.step.flops / 1e12:12,.1f} TFLOP, {ratio:.2f} × the model',
    f'  memory         {plan.step.bytes / 1e9:12,.1f} GB read and written',
  ]
  for (kind, axes), sent in sorted(plan.step.sent.items(), key=lambda item: -item[1]):
    if sent > 1e-3 * max(plan.step.sent.values()):
      along = ' · '.join(axes) + ' (slow links)' * any(
        run.across and run.across[axis] > 1 for axis in axes
      )
      lines.append(f'  {kind:15}{sent / 1e9:12,.2f} GB sent along {along}')
  if plan.turns:
    lines.append(f'  pipeline       {plan.idle:12.1%} of its turns idle')
  lines += [
    f'  rows of filler {plan.filler:12.2%} of the run, from rounding batches up to slices',
    '',
    'Estimate, no measurement: at best the longest of three takes all time, at the rates of the '
    'data sheet',
    f'  compute        {step.compute:12.3f} s at {plan.peak / 1e12:,.0f} TFLOP/s',
    f'  memory         {step.memory:12.3f} s at {plan.chip.bandwidth / 1e9:,.0f} GB/s',
    f'  network        {step.network:12.3f} s at {plan.chip.fast / 1e9:,.0f} GB/s'
    + f' and {(plan.chip.slow or math.nan) / 1e9:,.1f} between nodes' * bool(run.across),
    f'  step           {step.least:12.3f} s at best, bound by {step.bound}; {step.most:.3f} s if '
    'nothing overlaps',
    f'  MFU            {plan.mfu(step.least):12.1%} at best; {plan.mfu(step.most):.1%}',
    f'  run            {least / 86400:12,.1f} days at best; {most / 86400:,.1f}; for '
    f'{tokens / 1e9:,.1f} B tokens',
    f'  device-hours   {least / 3600 * plan.devices:12,.0f} at best; '
    f'{most / 3600 * plan.devices:,.0f}',
    f'  tokens a day   {tokens / least * 86400 / 1e9:12,.2f} B at best; '
    f'{tokens / most * 86400 / 1e9:,.2f} B',
    f'  source         {plan.chip.source}',
  ]
  return '\n'.join(lines)


def as_json(plan: Plan) -> dict:
  """A plan for programs: bytes, FLOPs and seconds."""
  step, run = plan.seconds(plan.step), plan.run
  least, most = plan.run_seconds
  sent = [
    {'kind': kind, 'axes': [*axes], 'bytes': size} for (kind, axes), size in plan.step.sent.items()
  ]
  return {
    'topology': plan.topology,
    'devices': plan.devices,
    'chip': dataclasses.asdict(plan.chip),
    'mesh': run.mesh,
    'across': run.across,
    'fits': plan.fits,
    'memory': dataclasses.asdict(plan.memory) | {'held': plan.memory.held},
    'step': {
      'sequences': run.slices * run.microbatch,
      'model_flops': plan.model_flops,
      'flops': plan.step.flops,
      'bytes': plan.step.bytes,
      'sent': sent,
      'idle': plan.idle,
    },
    'estimate': dataclasses.asdict(step)
    | {
      'bound': step.bound,
      'step': [step.least, step.most],
      'mfu': [plan.mfu(step.least), plan.mfu(step.most)],
      'run': [least, most],
    },
    'filler': plan.filler,
    'compile_seconds': plan.compile_seconds,
  }


if __name__ == '__main__':
  flags.run(main, __doc__, OPTIONS)
