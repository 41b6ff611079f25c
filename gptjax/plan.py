"""`python -m gptjax.plan --config=configs/gpt3.py:175b --topology=v5p:8x8x8` tells a run's cost.

It compiles the training step for a machine that need not be there, and tells what a device holds,
what it computes, moves and sends, and from that how long the run takes at best. Nothing is run.

  --topology=…   v4:2x2x2, v5e:4x4, v5p:4x4x8, v5p:4x4x8*2 (two slices), v6e:16x16, h100:16x8 (16
                 nodes of 8), h200:…, a100:…
  --json=FILE    the same figures for programs
"""

import argparse
import contextlib
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gptjax import estimate, flags, hlo, machines, metrics, sharding
from gptjax.config import Run, resolve
from gptjax.data import dataset
from gptjax.errors import mistake, told_as
from gptjax.estimate import Seconds, Work
from gptjax.machines import Chip

SMALLER = (
  '--config.compute.remat=full, a smaller --config.compute.microbatch, or more devices along '
  '--config.mesh.fsdp, tensor or stage'
)
OPTIONS = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
OPTIONS.add_argument('--topology', default='')
OPTIONS.add_argument('--json', default='')
# Of a GPU's memory JAX takes so much (launch/gpu.sh); a TPU's is its compiler's to fill.
USABLE = {'gpu': 0.9, 'tpu': 1.0, 'cpu': 1.0}


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
  compile_seconds: float
  memory: Memory
  besides: Work  # of a step besides its slices
  each: Work  # of each slice, or turn of a pipeline

  @property
  def turns(self) -> int:
    """Turns of a pipeline in a step besides its slices."""
    return 2 * (self.run.mesh['stage'] - 1)

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
  plan = make(config, options.topology)
  print(table(plan))
  if options.json:
    with told_as('--json', 'a file to write', 'another --json', OSError):
      pathlib.Path(options.json).write_text(json.dumps(as_json(plan), indent=2) + '\n')
  if plan.memory.held > plan.memory.there:
    raise SystemExit(1)


def make(config: ConfigDict, topology: str) -> Plan:
  """Compiles the training step of a config for a topology, and reads what came of it."""
  machines.check(topology)
  jax.config.update('jax_platforms', 'cpu')
  devices = machines.devices(topology)
  return plan_for(resolve(config, devices), devices, machines.chip(topology), topology)


def plan_for(run: Run, devices: Sequence[jax.Device], chip: Chip, topology: str) -> Plan:
  """The same for a config that was checked."""
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
    compile_seconds=took,
    memory=memory(run, mesh, compiled, int(chip.memory * USABLE[devices[0].platform])),
    besides=besides,
    each=once.plus(besides, -1),
  )


@contextlib.contextmanager
def refusals_told() -> Iterator[None]:
  """Turns what a compiler refuses into a Mistake: too little memory, or its own words."""
  try:
    yield
  except jax.errors.JaxRuntimeError as e:
    if sizes := estimate.out_of_memory(str(e)):
      used, there = (f'{size / 1e9:,.2f} GB' for size in sizes)
      over = f'{(sizes[0] - sizes[1]) / 1e9:,.2f} GB too much'
      raise mistake('memory of a device', f'{used}, {over}', f'at most {there}', SMALLER) from e
    words = '\n'.join(line[:200] for line in str(e).splitlines()[:8])
    fix = 'another topology or mesh, or compute.attention=chunked'
    raise mistake('the compiler', f'its refusal: {words}', 'a program', fix) from e


def compile_step(run: Run, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
  """The step that `train` runs, for the devices of a mesh."""
  program = run.program
  with jax.set_mesh(mesh):
    layout = jax.NamedSharding(mesh, sharding.computed('gbl'))
    tokens = dataset.features(program.shape.context, program.shape.vocab_size)['tokens']
    shape = run.slices, run.microbatch, *tokens.shape
    token_gbl = jax.ShapeDtypeStruct(shape, tokens.np_dtype, sharding=layout)
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
    B, L, D = run.microbatch, shape.context, shape.d_model
    layout = jax.NamedSharding(jax.sharding.get_abstract_mesh(), sharding.computed('btd'))
    one = math.prod(layout.shard_shape((B, L, D))) * program.numerics.dtype.itemsize
    return one * (2 * run.mesh['stage'] - 1)
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
  computed, surplus = run.ramp.slots(run.microbatch)
  gb = lambda size: f'{size / 1e9:12,.2f} GB'
  mesh = ' · '.join(f'{axis} {size}' for axis, size in run.mesh.items())
  lines = [
    f'{plan.topology}: {plan.devices} × {plan.chip.kind}; {mesh}',
    f'{shape.n_params:,} parameters; {run.slices} slices of {run.microbatch} sequences; '
    f'{run.program.numerics.dtype.name}, remat {run.program.numerics.remat}, '
    f'attention {run.program.numerics.attend.__name__}; compiled in {plan.compile_seconds:.0f} s',
    '',
    'Memory of a device',
  ]
  for field in dataclasses.fields(Memory)[:-1]:
    lines.append(f'  {field.name:14}{gb(getattr(m, field.name))}')
  left = m.there - m.held
  fits = f'fits, with {left / 1e9:,.2f} GB left' if left >= 0 else f'{-left / 1e9:,.2f} GB too much'
  lines += [f'  {"together":14}{gb(m.held)} of {m.there / 1e9:,.2f} GB: {fits}', '']
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
    idle = plan.turns / (run.slices + plan.turns)
    lines.append(f'  pipeline       {idle:12.1%} of its turns idle')
  lines += [
    f'  rows of filler {surplus / computed:12.2%} of the run, from rounding batches up to slices',
    '',
    'Estimate, at the rates of the data sheet: no measurement, and no run is faster than "at best"',
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
  computed, surplus = run.ramp.slots(run.microbatch)
  sent = [
    {'kind': kind, 'axes': axes, 'bytes': size} for (kind, axes), size in plan.step.sent.items()
  ]
  return {
    'topology': plan.topology,
    'devices': plan.devices,
    'chip': dataclasses.asdict(plan.chip),
    'mesh': run.mesh,
    'across': run.across,
    'fits': plan.memory.held <= plan.memory.there,
    'memory': dataclasses.asdict(plan.memory) | {'held': plan.memory.held},
    'step': {
      'sequences': run.slices * run.microbatch,
      'model_flops': plan.model_flops,
      'flops': plan.step.flops,
      'bytes': plan.step.bytes,
      'sent': sent,
      'idle': plan.turns / (run.slices + plan.turns),
    },
    'estimate': dataclasses.asdict(step)
    | {
      'bound': step.bound,
      'step': [step.least, step.most],
      'mfu': [plan.mfu(step.least), plan.mfu(step.most)],
      'run': [least, most],
    },
    'filler': surplus / computed,
    'compile_seconds': plan.compile_seconds,
  }


if __name__ == '__main__':
  flags.run(main, __doc__, OPTIONS)
