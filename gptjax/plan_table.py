"""A plan for people, as a table or a line, and for programs."""

import dataclasses
import math
from collections.abc import Iterator

from gptjax import summary
from gptjax.cost import Plan
from gptjax.memory import Memory

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


def table(plan: Plan) -> str:
  """A plan for people."""
  parts = _head(plan), _memory(plan.memory, plan.machine.chip.memory), _step(plan), _estimate(plan)
  return '\n\n'.join('\n'.join(part) for part in parts)


def _head(plan: Plan) -> Iterator[str]:
  run, machine, numerics = plan.run, plan.machine, plan.run.program.numerics
  mesh = summary.in_axes(run.mesh)
  yield f'{machine.topology}: {len(machine.devices)} × {machine.chip.kind}; {mesh}'
  yield (
    f'{run.program.shape.n_params:,} parameters; {run.slices} slices of {run.microbatch} '
    f'sequences; {numerics.dtype.name}, remat {numerics.remat}, layers '
    f'{"apart" if numerics.apart else "in a loop"}, attention '
    f'{numerics.attend.__name__}; compiled in {plan.compile_seconds:.0f} s'
  )
  order = [device.id for device in plan.mesh.devices.flat]
  for name, told in summary.links(run, order).items():
    yield f'{name:8} {told}'


def _memory(m: Memory, all_there: int) -> Iterator[str]:
  row = lambda name, size: f'  {name:14}{size / 1e9:12,.2f} GB'
  yield 'Memory of a device'
  for field in dataclasses.fields(Memory)[:-1]:
    if size := getattr(m, field.name):  # a compiler that does not tell the program's says 0
      yield row(field.name, size)
  left = (m.there - m.held) / 1e9
  share = f' ({m.there / all_there:.0%} of all)' * (m.there < all_there)
  fits = f'fits, with {left:,.2f} GB left' if left >= 0 else f'{-left:,.2f} GB too much'
  yield f'{row("together", m.held)} of {m.there / 1e9:,.2f} GB{share}: {fits}'


def _step(plan: Plan) -> Iterator[str]:
  run, step = plan.run, plan.step
  yield f'What each device does in a step of {run.slices * run.microbatch:,} sequences'
  yield f'  model          {plan.model_flops / 1e12:12,.1f} TFLOP'
  ratio = step.flops / plan.model_flops
  yield f'  compiled       {step.flops / 1e12:12,.1f} TFLOP, {ratio:.2f} × the model'
  yield f'  memory         {step.bytes / 1e9:12,.1f} GB read and written'
  for (kind, axes), sent in sorted(step.sent.items(), key=lambda item: -item[1]):
    if sent > 1e-3 * max(step.sent.values()):
      slow = ' (slow links)' * any(run.across.get(axis, 1) > 1 for axis in axes)
      yield f'  {kind:15}{sent / 1e9:12,.2f} GB sent along {" · ".join(axes)}{slow}'
  if plan.turns:
    yield f'  pipeline       {plan.idle:12.1%} of its turns idle'
  yield f'  rows of filler {plan.filler:12.2%} of the run, from rounding batches up to slices'


def _estimate(plan: Plan) -> Iterator[str]:
  run, chip, step = plan.run, plan.machine.chip, plan.seconds(plan.step)
  least, most = plan.run_seconds
  tokens = run.ramp.total * run.program.shape.context
  hours = len(plan.machine.devices) / 3600
  between = f' and {(chip.slow or math.nan) / 1e9:,.1f} between nodes' * bool(run.across)
  yield (
    'Estimate, no measurement: at best the longest of three takes all time, at the rates of the '
    'data sheet'
  )
  slower = ', which float32 does not reach' * (run.program.numerics.dtype.name == 'float32')
  yield f'  compute        {step.compute:12.3f} s at {plan.peak / 1e12:,.0f} TFLOP/s{slower}'
  yield f'  memory         {step.memory:12.3f} s at {chip.bandwidth / 1e9:,.0f} GB/s'
  yield f'  network        {step.network:12.3f} s at {chip.fast / 1e9:,.0f} GB/s{between}'
  yield (
    f'  step           {step.least:12.3f} s at best, bound by {step.bound}; '
    f'{step.most:.3f} s if nothing overlaps'
  )
  yield f'  MFU            {plan.mfu(step.least):12.1%} at best; {plan.mfu(step.most):.1%}'
  days = f'{least / 86400:12,.1f} days at best; {most / 86400:,.1f}'
  yield f'  run            {days}; for {tokens / 1e9:,.1f} B tokens'
  yield f'  device-hours   {least * hours:12,.0f} at best; {most * hours:,.0f}'
  daily = tokens * 86400 / 1e9
  yield f'  tokens a day   {daily / least:12,.2f} B at best; {daily / most:,.2f} B'
  yield f'  source         {chip.source}'


def as_json(plan: Plan) -> dict:
  """A plan for programs: bytes, FLOPs and seconds."""
  step, run, machine = plan.seconds(plan.step), plan.run, plan.machine
  sent = [
    {'kind': kind, 'axes': [*axes], 'bytes': size} for (kind, axes), size in plan.step.sent.items()
  ]
  return {
    'topology': machine.topology,
    'devices': len(machine.devices),
    'chip': dataclasses.asdict(machine.chip),
    'settings': plan.settings.knobs(),
    'parameters': run.program.shape.n_params,
    'dtype': run.program.numerics.dtype.name,
    'attention': run.program.numerics.attend.__name__,
    'tokens': run.ramp.total * run.program.shape.context,
    'peak_flops': plan.peak,
    'across': run.across,
    'fits': plan.fits,
    'memory': dataclasses.asdict(plan.memory) | {'held': plan.memory.held},
    'step': {
      'sequences': run.slices * run.microbatch,
      'slices': run.slices,
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
      'run': [*plan.run_seconds],
    },
    'filler': plan.filler,
    'compile_seconds': plan.compile_seconds,
  }
