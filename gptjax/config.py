"""The door: a config as a user wrote it becomes what the code below takes, or one clear error."""

import dataclasses
import json
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from gptjax import checkpoint, flags, kernels, process, products, schedule, sharding, skips
from gptjax.data import mixture
from gptjax.errors import Mistake, mistake, raise_all, told_as
from gptjax.model import REMAT, Numerics
from gptjax.optimizer import AdamW
from gptjax.sizes import Shape
from gptjax.stability import Guard
from gptjax.step import Program

DTYPES = ('auto', 'float32', 'bfloat16')
LAYERS = ('dense', 'banded')
LEAST_EPS = 1e-30  # f32 has less, but not in products with it
LARGEST = 2**20  # of a size: what is larger is a slip of the keyboard
MOST_APART = 24  # layers that are compiled apart unasked: it takes one to four times as long
# Every knob of a training config, by group: no other is taken, and none may be left out.
KNOBS = {
  '': 'workdir hosts seed init_from deterministic train_tokens skip_sequences profile',
  'model': 'n_layers d_model n_heads d_head d_ff context vocab_size pattern window dropout '
  'qkv_bias',
  'data': 'sources prefetch',
  'batch': 'sequences ramp_from ramp_step ramp_tokens',
  'lr': 'peak warmup_tokens decay_tokens final_fraction',
  'adamw': 'b1 b2 eps weight_decay clip_norm',
  'eval': 'every_tokens sequences',
  'save': 'every_tokens keep keep_every_tokens failures',
  'resume': 'accept_changes',
  'stability': 'spike window streak rollbacks',
  'watchdog': 'seconds ends',
  'check': 'every_tokens',
  'mesh': 'data fsdp tensor stage slow_axes',
  'compute': 'microbatch dtype attention remat layers loss_chunk compiled cache',
  'log': 'progress tensorboard wandb',
}


@dataclasses.dataclass(frozen=True)
class Run:
  """A config that was checked; durations in sequences."""

  program: Program
  lr: optax.Schedule
  ramp: schedule.Ramp
  mesh: dict[str, int]
  across: dict[str, int]  # into how many parts the links between nodes cut each axis
  microbatch: int  # sequences in a slice over the whole mesh
  slices: int  # in a step of the full batch
  eval_every: int
  eval_sequences: int
  save_every: int
  save_keep: int  # newest checkpoints
  save_keep_every: int  # besides the first at or after each multiple
  save_failures: int  # in a row, at which the run ends
  prefetch: int  # batches made ahead
  check_every: int  # whether the machine computes right
  profile: range  # step numbers to trace
  skipped: list[range]  # sequences that the config leaves out
  streak: int  # bad steps in a row after which a state is given up
  rollbacks: int  # how often that may be
  init_from: str  # where new weights come from; '': they are drawn
  compiled: str  # a file with the compiled step; '': it is compiled at the start

  def make_mesh(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Its mesh, over all devices or over those that it was checked against."""
    return sharding.make_mesh(**self.mesh, devices=devices, across=self.across)


def resolve(config: ConfigDict, devices: Sequence[jax.Device]) -> Run:
  """Checks a training config against the devices it shall run on.

  Raises:
    Mistake: with everything that is wrong with it, at once.
  """
  check_knobs(config)
  found = _Found()
  found.keep(_workdir, config.workdir)
  found.keep(mixture.parse, config.data.sources)
  shape = found.keep(_shape, config)
  mesh = found.keep(_mesh, config, len(devices))
  if shape and mesh:
    found.keep(sharding.check, shape, mesh, len(devices))
  across, fits = {}, mesh and math.prod(mesh.values()) == len(devices)
  if fits:
    across = found.keep(sharding.cross, mesh, devices, config.mesh.slow_axes)
  dtype = found.keep(_dtype, config, devices[0].platform)
  remat = found.keep(_remat, config)
  apart = found.keep(_apart, config, devices[0].platform, remat)
  dropout = found.keep(_dropout, config)
  attention = config.compute.attention
  kernel = found.keep(kernels.named, attention, devices[0].platform)
  if None not in (kernel, shape, dtype, dropout):
    attend = found.keep(kernels.choose, attention, devices, shape, dtype, dropout)
  optimizer = found.keep(_optimizer, config)
  total = found.keep(_total, config)
  lr = found.keep(_lr, config) if config.model.context > 0 else None
  full = found.keep(_at_least, 'batch.sequences', config.batch.sequences, 1, LARGEST)
  ramp = found.keep(_ramp, config, total) if total and full else None
  rows = found.keep(_at_least, 'compute.microbatch', config.compute.microbatch, 1)
  microbatch = found.keep(_microbatch, config, mesh, rows) if fits and full and rows else None
  chunk = found.keep(_at_least, 'compute.loss_chunk', config.compute.loss_chunk, 1)
  for name, value, least in (
    ('data.prefetch', config.data.prefetch, 0),
    ('eval.every_tokens', config.eval.every_tokens, 0),
    ('eval.sequences', config.eval.sequences, 1),
    ('save.every_tokens', config.save.every_tokens, 0),
    ('save.keep', config.save.keep, 1),
    ('save.keep_every_tokens', config.save.keep_every_tokens, 0),
    ('save.failures', config.save.failures, 1),
    ('watchdog.seconds', config.watchdog.seconds, 0),
    ('check.every_tokens', config.check.every_tokens, 0),
    ('stability.spike', config.stability.spike, 0),
    ('stability.window', config.stability.window, 2),
    ('stability.streak', config.stability.streak, 1),
    ('stability.rollbacks', config.stability.rollbacks, 0),
  ):
    found.keep(_at_least, name, value, least)
  found.keep(check_seed, config.seed)
  profile = found.keep(_profile, config.profile)
  found.keep(_repeatable, config, devices[0].platform)
  skipped = found.keep(skips.parse, config.skip_sequences)
  raise_all(found.mistakes)
  sequences = lambda tokens: schedule.to_sequences(tokens, shape.context)
  return Run(
    program=Program(
      shape,
      _numerics(devices[0].platform, dtype, attend, remat, apart, dropout),
      optimizer,
      chunk,
      config.seed,
      Guard(config.stability.spike, config.stability.window),
    ),
    lr=lr,
    ramp=ramp,
    mesh=mesh,
    across=across,
    microbatch=microbatch,
    slices=full // microbatch,
    eval_every=sequences(config.eval.every_tokens),
    eval_sequences=config.eval.sequences,
    save_every=sequences(config.save.every_tokens),
    save_keep=config.save.keep,
    save_keep_every=sequences(config.save.keep_every_tokens),
    save_failures=config.save.failures,
    prefetch=config.data.prefetch,
    check_every=sequences(config.check.every_tokens),
    profile=profile,
    skipped=skipped,
    streak=config.stability.streak,
    rollbacks=config.stability.rollbacks,
    init_from=config.init_from,
    compiled=config.compute.compiled,
  )


def check_knobs(config: ConfigDict) -> None:
  """Raises for every knob that is unknown, missing or not a finite number."""
  known = [f'{group}.{k}'.lstrip('.') for group, names in KNOBS.items() for k in names.split()]
  given = checkpoint.flatten(config.to_dict())
  if not given.keys() & {name for name in known if '.' in name}:
    got = f'a config of {", ".join(sorted(given))}'
    raise mistake('--config', got, 'a training config', '--config=configs/tiny.py')
  mistakes = []
  for name in sorted(given.keys() - set(known)):
    fix = flags.nearest(name, known) or 'leaving it out'
    mistakes.append(mistake(f'config.{name}', 'an unknown knob', 'a known one', fix))
  for name in sorted(set(known) - given.keys()):
    fix = 'setting it as configs/tiny.py does'
    mistakes.append(mistake(f'config.{name}', 'no such knob', 'all knobs in a config', fix))
  for name, value in given.items():
    if isinstance(value, float) and not math.isfinite(value):
      mistakes.append(mistake(name, value, 'a finite number', f'another --config.{name}'))
  raise_all(mistakes)


class _Found:
  """Collects mistakes, so that all are told at once."""

  def __init__(self):
    self.mistakes: list[Mistake] = []

  def keep(self, check, *args):
    try:
      return check(*args)
    except Mistake as e:
      self.mistakes.append(e)
      return None


def _at_least(name, value, least, most=None):
  if value < least:
    raise mistake(name, value, f'{least} or more', f'--config.{name}={least}')
  if most is not None and value > most:
    raise mistake(name, value, f'{most} or less', f'a smaller --config.{name}')
  return value


def _workdir(workdir):
  if not workdir:
    raise mistake('workdir', 'none', 'a folder', '--config.workdir=runs/…, or gs://bucket/folder')
  with told_as('workdir', 'a name in UTF-8', '--config.workdir=runs/…', UnicodeError):
    workdir.encode()


def reopened(text: str) -> Program:
  """The program of a run's own config.json, on one device whatever it was trained on."""
  config = ConfigDict(json.loads(text))
  config.compute.layers = 'loop'  # which older runs do not say
  check_knobs(config)
  config.mesh = ConfigDict(dict.fromkeys(sharding.AXES, 1) | {'slow_axes': 'auto'})
  config.compute.microbatch = 1
  config.compute.attention = 'chunked'  # any machine has it
  return resolve(config, process.found()[:1]).program


def untrained(shape: Shape) -> Program:
  """A program for weights that were trained elsewhere: to read with; what trains is not set."""
  devices = process.found()
  dtype = jnp.dtype('float32' if devices[0].platform == 'cpu' else 'bfloat16')
  attend = kernels.choose('chunked', devices, shape, dtype, 0.0)
  numerics = _numerics(devices[0].platform, dtype, attend, 'none', False, 0.0)
  return Program(shape, numerics, AdamW(0.0, 0.0, 1.0, 0.0, 1.0), shape.context, 0, Guard(0.0, 2))


def check_seed(seed: int) -> None:
  """Raises for a seed that JAX would cut."""
  _at_least('seed', seed, 0)
  if seed >= 2**32:  # JAX would keep the lower 32 bits for the weights, Grain more for the order
    raise mistake('seed', seed, 'less than 4294967296', '--config.seed=0')


def _shape(config) -> Shape:
  c = config.model
  for name in ('n_layers', 'd_model', 'n_heads', 'd_head', 'd_ff', 'context', 'vocab_size'):
    _at_least(f'model.{name}', c[name], 1, LARGEST)
  _at_least('model.window', c.window, 1)
  if not c.pattern or not set(c.pattern) <= set(LAYERS):
    wanted = f'some of {LAYERS}'
    raise mistake('model.pattern', c.pattern, wanted, '--config.model.pattern="(\'dense\',)"')
  windows = tuple({'dense': None, 'banded': min(c.window, c.context)}[layer] for layer in c.pattern)
  sizes = c.n_layers, c.d_model, c.n_heads, c.d_head, c.d_ff, c.context, c.vocab_size
  return Shape(*sizes, windows, c.qkv_bias)


def _mesh(config, n_devices) -> dict[str, int]:
  c = config.mesh
  sizes = {'stage': c.stage, 'data': c.data, 'fsdp': c.fsdp, 'tensor': c.tensor}
  assert tuple(sizes) == sharding.AXES
  for axis, size in sizes.items():
    if size < 1 and not (axis == 'data' and size == -1):
      raise mistake(f'mesh.{axis}', size, '1 or more', f'--config.mesh.{axis}=1')
  if sizes['data'] == -1:
    sizes['data'] = max(1, n_devices // (sizes['stage'] * sizes['fsdp'] * sizes['tensor']))
  return sizes


def _dtype(config, platform) -> jnp.dtype:
  name = config.compute.dtype
  if name not in DTYPES:
    raise mistake('compute.dtype', name, f'one of {DTYPES}', '--config.compute.dtype=auto')
  if name == 'auto':
    name = 'float32' if platform == 'cpu' else 'bfloat16'
  return jnp.dtype(name)


def _numerics(platform, dtype, attend, remat, apart, dropout) -> Numerics:
  if platform == 'cpu':
    multiply = products.in_bf16 if dtype == jnp.bfloat16 else products.in_f32
    between = jnp.dtype('float32')
  else:
    multiply, between = products.by_parts if platform == 'gpu' else products.plainly, dtype
  return Numerics(dtype, between, attend, multiply, remat, apart, dropout)


def _remat(config) -> str:
  name = config.compute.remat
  if name not in REMAT:
    raise mistake('compute.remat', name, f'one of {tuple(REMAT)}', '--config.compute.remat=dots')
  return name


def _apart(config, platform, remat) -> bool:
  name = config.compute.layers
  if name not in ('auto', 'loop', 'apart'):
    wanted = "one of ('auto', 'loop', 'apart')"
    raise mistake('compute.layers', name, wanted, '--config.compute.layers=auto')
  few = config.model.n_layers <= MOST_APART
  # On a TPU there is little to gain but where a loop stacks all residuals.
  gains = platform == 'gpu' or platform == 'tpu' and remat == 'none'
  return name == 'apart' or name == 'auto' and gains and few


def _dropout(config) -> float:
  rate = config.model.dropout
  if not 0 <= rate < 1:
    raise mistake('model.dropout', rate, '0 ≤ … < 1', '--config.model.dropout=0.0')
  return rate


def _optimizer(config) -> AdamW:
  c = config.adamw
  for name, value in (('b1', c.b1), ('b2', c.b2)):
    if not 0 <= value < 1:
      raise mistake(f'adamw.{name}', value, '0 ≤ … < 1', f'--config.adamw.{name}=0.9')
  _at_least('adamw.weight_decay', c.weight_decay, 0)
  if not (c.eps >= LEAST_EPS and c.clip_norm > 0):
    got = f'eps {c.eps}, clip_norm {c.clip_norm}'
    wanted, fix = f'eps {LEAST_EPS} or more, clip_norm above 0', '--config.adamw.eps=1e-8'
    raise mistake('adamw', got, wanted, f'{fix} --config.adamw.clip_norm=1.0')
  return AdamW(c.b1, c.b2, c.eps, c.weight_decay, c.clip_norm)


def _total(config) -> int:
  _at_least('model.context', config.model.context, 1)
  total = schedule.to_sequences(config.train_tokens, config.model.context)
  if not 1 <= total <= schedule.MAX_SEQUENCES:
    wanted = f'1 to {schedule.MAX_SEQUENCES} sequences'
    got = f'{config.train_tokens:g} tokens = {total} sequences'
    most = float(min(300e9, schedule.MAX_SEQUENCES * config.model.context))
    raise mistake('train_tokens', got, wanted, f'--config.train_tokens={most}')
  return total


def _lr(config) -> optax.Schedule:
  c = config.lr
  if not c.peak > 0 or not 0 <= c.final_fraction <= 1:
    got = f'peak {c.peak}, final_fraction {c.final_fraction}'
    raise mistake('lr', got, 'a peak above 0, a fraction from 0 to 1', '--config.lr.peak=6e-4')
  return schedule.learning_rate(
    c.peak, c.warmup_tokens, c.decay_tokens, c.final_fraction, config.model.context
  )


def _ramp(config, total) -> schedule.Ramp:
  c = config.batch
  ramps = not c.ramp_tokens or 1 <= c.ramp_from <= c.sequences
  if not ramps or c.ramp_step < 1 or c.ramp_tokens < 0:
    got = f'from {c.ramp_from} by {c.ramp_step} to {c.sequences} over {c.ramp_tokens:g} tokens'
    wanted = '1 ≤ ramp_from ≤ sequences, ramp_step ≥ 1, ramp_tokens ≥ 0'
    raise mistake('batch', got, wanted, '--config.batch.ramp_tokens=0.0 for no ramp')
  length = schedule.to_sequences(c.ramp_tokens, config.model.context)
  return schedule.Ramp.linear(c.ramp_from, c.sequences, c.ramp_step, length, total)


def _microbatch(config, mesh, rows) -> int:
  data, fsdp = mesh['data'], mesh['fsdp']
  microbatch = data * fsdp * rows
  if config.batch.sequences % microbatch:
    most = min(rows, config.batch.sequences)
    fitting = [r for r in range(1, most + 1) if config.batch.sequences % (data * fsdp * r) == 0]
    also = f' or --config.compute.microbatch={fitting[-1]}' if fitting else ''
    raise mistake(
      'batch.sequences over data·fsdp·microbatch',
      f'{config.batch.sequences} over {data}·{fsdp}·{rows} = {microbatch}',
      f'a multiple of {microbatch}',
      f'--config.batch.sequences={-(-config.batch.sequences // microbatch) * microbatch}{also}',
    )
  return microbatch


def _repeatable(config, platform) -> None:
  if config.check.every_tokens and platform == 'gpu' and not config.deterministic:
    got = 'a step to compute twice, whose kernels may add in another order'
    fix = '--config.deterministic, or --config.check.every_tokens=0.0'
    raise mistake('check.every_tokens', got, 'the same bits from a machine that is right', fix)


def _profile(text) -> range:
  if not text:
    return range(0)
  steps = skips.first_to_last(text)
  if not steps or steps.start < 1:
    raise mistake('profile', text, 'first-last step, from 1', "--config.profile='20-22'")
  return steps
