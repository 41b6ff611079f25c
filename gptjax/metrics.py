"""What a run tells of itself: records on disk, TensorBoard, a progress bar, throughput and MFU."""

import collections
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import TextIO

import jax
import tensorboardX
import tqdm

from gptjax import files
from gptjax.errors import Mistake, mistake, told_as

FILE = 'metrics.jsonl'
TIMED = {'time', 'seconds', 'tokens_per_second', 'mfu', 'peak_bytes'}
REQUIRED = {'kind': str, 'step': int, 'sequences': int, 'tokens': int}

# Dense bf16 FLOP/s of one JAX device, by the exact `device_kind`: data sheets often print the
# doubled figure for structured sparsity, and a part of a name is shared by chips that differ
# (H100 SXM, NVL and PCIe; L40 and L40S). Sources: cloud.google.com/tpu/docs/system-architecture and
# the page of each version; NVIDIA's data sheets and architecture whitepapers.
PEAK_FLOPS = {
  'TPU v2': 22.5e12,  # 45 a chip, which is two devices
  'TPU v3': 61.5e12,  # 123 a chip, which is two devices
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5': 459e12,  # v5p
  'TPU v5p': 459e12,
  'TPU v6 lite': 918e12,
  'TPU v6e': 918e12,
  'TPU7x': 1153.5e12,  # 2307 a chip, which is two devices
  'NVIDIA A100-SXM4-40GB': 312e12,  # A100 data sheet
  'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA A100-PCIE-40GB': 312e12,
  'NVIDIA A100 80GB PCIe': 312e12,
  'NVIDIA H100 80GB HBM3': 989.4e12,  # SXM5; H100 whitepaper, table 2
  'NVIDIA H100 PCIe': 756e12,  # the same table
  'NVIDIA H100 NVL': 835.5e12,  # H100 data sheet
  'NVIDIA H200': 989.4e12,  # H200 data sheet
  'NVIDIA H200 NVL': 835.5e12,
  'NVIDIA GH200 480GB': 989.4e12,  # GH200 data sheet
  'NVIDIA B200': 2250e12,  # HGX B200 data sheet
  'NVIDIA GB200': 2500e12,  # GB200 NVL72 data sheet
  'NVIDIA A10': 125e12,
  'NVIDIA A40': 149.7e12,
  'NVIDIA L4': 121e12,
  'NVIDIA L40': 181.05e12,
  'NVIDIA L40S': 362.05e12,
  'NVIDIA GeForce RTX 3090': 71e12,  # sums in f32; GA102 whitepaper, appendix A
  'NVIDIA GeForce RTX 4090': 165.2e12,  # sums in f32; Ada whitepaper, appendix A
}


def peak_flops(device_kind: str) -> float | None:
  """Dense bf16 FLOP/s of one device, or None for a device that the table does not know."""
  return PEAK_FLOPS.get(device_kind)


def mfu(
  flops_per_token: float, tokens_per_second: float, device_kind: str, n_devices: int
) -> float | None:
  """Model FLOPs utilization: a fraction of all devices' bf16 peak, whatever dtype the run uses.

  `flops_per_token` is of a training step without recompute (Chowdhery et al. 2022, appendix B);
  `tokens_per_second` is of the whole run. None for an unknown device, never a wrong number.
  """
  peak = peak_flops(device_kind)
  return None if peak is None else flops_per_token * tokens_per_second / (peak * n_devices)


def peak_memory_bytes() -> int | None:
  """The most bytes ever in use on one of this process's devices; None where none reports it."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  return max((s['peak_bytes_in_use'] for s in stats if 'peak_bytes_in_use' in s), default=None)


class Throughput:
  """Tokens per second over the last `steps` steps, without the first: it compiles."""

  def __init__(self, steps: int = 20):
    self._last: collections.deque[tuple[int, float]] = collections.deque(maxlen=steps)
    self._compiled = False

  def add(self, tokens: int, seconds: float) -> float | None:
    """Counts a step in and returns the rate; None until there was a step after the first."""
    if self._compiled:
      self._last.append((tokens, seconds))
    self._compiled = True
    elapsed = sum(seconds for _, seconds in self._last)
    return sum(tokens for tokens, _ in self._last) / elapsed if elapsed else None


class MetricsWriter:
  """Appends records to `workdir/metrics.jsonl`, and to TensorBoard and W&B if asked to.

  A record is a flat dict with `kind`, `step`, `sequences`, `tokens`. The JSONL file holds each
  position once: whatever lies after `resume_at`, the sequences consumed at the checkpoint that is
  resumed from, is dropped first, and with 0 all is, but records of kind `start`. `lost` tells of
  what is dropped: its `steps`, and when the last record of all was `heard`. TensorBoard forgets the
  same steps; W&B cannot, and shows both. NaN and the infinities are the strings 'NaN', 'Infinity'
  and '-Infinity', since JSON has no such numbers; `read` gives the floats back.

  Raises:
    Mistake: wandb is asked for and not installed, or the file is damaged.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    resume_at: int,
    tensorboard: bool,
    wandb_project: str = '',
    enabled: bool = True,
  ):
    """With `enabled` False, as in every process of a run but one, nothing is written."""
    self._file = self._tensorboard = self._wandb = None
    self.lost = {'steps': 0, 'heard': None}
    if not enabled:
      return
    wandb = import_wandb() if wandb_project else None
    path = _path(workdir)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept, dropped = _keep(path, resume_at)
    heard = max((r['time'] for r in [*kept, *dropped] if 'time' in r), default=None)
    self.lost = {'steps': sum(r['kind'] == 'train' for r in dropped), 'heard': heard}
    self._file = path.open('a')
    if tensorboard:
      # What TensorBoard has at or after `purge_step` is forgotten. If there is no record to tell
      # the tokens at `resume_at`, nothing can be.
      purge = max(r['tokens'] for r in kept) + 1 if kept else None if resume_at else 0
      self._tensorboard = tensorboardX.SummaryWriter(
        str(path.parent / 'tensorboard'),
        purge_step=purge,
        flush_secs=10,
        # Its own file names differ by the second only, and it overwrites one that is there.
        filename_suffix=f'.{time.time_ns()}',
      )
    if wandb:
      self._wandb = wandb.init(project=wandb_project, name=path.parent.name, dir=str(path.parent))
      self._wandb.define_metric('*', step_metric='tokens')

  def write(self, record: dict) -> None:
    """Writes one record with the `time` and flushes it; values that are None are left out."""
    if not self._file:
      return
    record = record | {'time': round(time.time(), 3)}
    record = {name: _plain(value) for name, value in record.items() if value is not None}
    kind, tokens = record['kind'], record['tokens']
    assert {'step', 'sequences'} <= record.keys(), record
    encoded = {name: _encode(value) for name, value in record.items()}
    self._file.write(json.dumps(encoded, allow_nan=False) + '\n')
    self._file.flush()
    scalars = {
      f'{kind}/{name}': value
      for name, value in record.items()
      if name not in ('tokens', 'time') and isinstance(value, int | float)
    }
    if self._tensorboard:
      for name, value in scalars.items():
        self._tensorboard.add_scalar(name, value, tokens)
    if self._wandb:
      self._wandb.log(scalars | {'tokens': tokens})

  def sync(self) -> None:
    """Returns when what was written is on disk, whatever happens to the machine."""
    if self._file:
      os.fsync(self._file.fileno())

  def close(self) -> None:
    """Ends all that is written to; may be called twice."""
    for sink in (self._file, self._tensorboard):
      if sink:
        sink.close()
    if self._wandb:
      self._wandb.finish()
    self._file = self._tensorboard = self._wandb = None

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *_) -> None:
    self.close()


def read(workdir: str | os.PathLike) -> list[dict]:
  """The records of a run, in the order they were written.

  Raises:
    Mistake: there are none, or the file is damaged elsewhere than in its last line.
  """
  path = _path(workdir)
  records = _parse(path) if path.exists() else []
  if not records:
    raise mistake(
      str(path),
      'no records' if path.exists() else 'no such file',
      'the metrics of a run',
      'the workdir of a run that has taken a step',
    )
  return records


def timeless(workdir: str | os.PathLike, kind: str) -> list[dict]:
  """The records of a kind, without what the speed of the machine is in."""
  found = [r for r in read(workdir) if r['kind'] == kind]
  return [{name: value for name, value in r.items() if name not in TIMED} for r in found]


def reached(workdir: str | os.PathLike) -> int:
  """The sequences consumed at the last record of a run; 0 if there is none.

  Raises:
    Mistake: the file is damaged elsewhere than in its last line.
  """
  path = _path(workdir)
  records = _parse(path) if path.exists() else []
  return max((r['sequences'] for r in records if r['kind'] != 'start'), default=0)


class ProgressBar:
  """How far a run is, in sequences, with its loss and throughput and the time left.

  In sequences and not in steps, whose pace changes with the batch. On a terminal it is a bar;
  elsewhere a plain line every `seconds`, and one at the end.
  """

  def __init__(
    self,
    total: int,
    start: int,
    context: int,
    *,
    enabled: bool = True,
    seconds: float = 30,
    file: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """`total` and `start` in sequences of `context` tokens; `start` is where a run goes on."""
    self._total, self._position, self._context = total, start, context
    self._seconds, self._file, self._clock = seconds, file or sys.stderr, clock
    self._throughput = Throughput()
    self._bar = self._line = self._said_at = None
    self._plain = enabled and not self._file.isatty()
    if enabled and not self._plain:
      self._bar = tqdm.tqdm(
        total=total,
        initial=start,
        bar_format='{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} sequences, {elapsed}{postfix}',
        dynamic_ncols=True,
        file=self._file,
      )

  def update(self, record: dict) -> None:
    """Shows a step, from its record of kind `train`."""
    rate = self._throughput.add(record['batch'] * self._context, record['seconds'])
    self._position = record['sequences']
    words = [f'loss {record["loss"]:.4f}']
    if rate:
      words.append(f'{rate:,.0f} tokens/s')
    if record.get('mfu') is not None:
      words.append(f'MFU {record["mfu"]:.1%}')
    if rate:
      left = (self._total - self._position) * self._context / rate
      words.append(f'{tqdm.tqdm.format_interval(left)} left')
    told = ', '.join(words)
    if self._bar is not None:
      self._bar.set_postfix_str(told, refresh=False)
      self._bar.update(self._position - self._bar.n)
    elif self._plain:
      share = f'{self._position / self._total:.1%}'
      self._line = f'{share}, {self._position:,} of {self._total:,} sequences, {told}'
      now = self._clock()
      if self._said_at is None or now - self._said_at >= self._seconds:
        self._said_at = now
        self._print()

  def say(self, text: str) -> None:
    """Prints a line without tearing the bar."""
    if self._bar is not None:
      self._bar.write(text, file=self._file)
    elif self._plain:
      print(text, file=self._file, flush=True)

  def close(self) -> None:
    """Leaves the last state on the screen; may be called twice."""
    if self._bar is not None:
      self._bar.close()
    self._print()

  def _print(self) -> None:
    if self._line:
      print(self._line, file=self._file, flush=True)
      self._line = None

  def __enter__(self) -> 'ProgressBar':
    return self

  def __exit__(self, *_) -> None:
    self.close()


def _path(workdir: str | os.PathLike) -> pathlib.Path:
  if '://' in str(workdir):
    raise mistake('workdir', workdir, 'a folder', 'a bucket mounted as one')
  return pathlib.Path(workdir).absolute() / FILE


def _keep(path: pathlib.Path, resume_at: int) -> tuple[list[dict], list[dict]]:
  """Drops the records after `resume_at` from the file, or all for 0; returns the others, and these.

  Those of kind `start` stay: they tell of what was lost.
  """
  if not path.exists():
    return [], []
  # The baseline of a stage that begins here is written again when it does.
  again = {'kind': 'baseline', 'sequences': resume_at}.items()
  kept, dropped = [], []
  for r in _parse(path):
    stays = 0 < resume_at and r['sequences'] <= resume_at and not again <= r.items()
    (kept if stays or r['kind'] == 'start' else dropped).append(r)
  lines = [json.dumps({name: _encode(value) for name, value in r.items()}) + '\n' for r in kept]
  files.write_whole(path, ''.join(lines))
  return kept, dropped


def _parse(path: pathlib.Path) -> list[dict]:
  """All records of a file but a last one that was not written to its end."""
  records = []
  with told_as(path, 'a readable file', 'another workdir', OSError):
    lines = path.read_bytes().splitlines()
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
      if not all(isinstance(record[name], kind) for name, kind in REQUIRED.items()):
        raise ValueError
      records.append({name: _decode(value) for name, value in record.items()})
    except (ValueError, KeyError, TypeError, AttributeError):
      if number < len(lines):
        raise mistake(
          f'{path}, line {number}', repr(line[:60]), 'a record of a run', 'removing that line'
        ) from None
  return records


NOT_NUMBERS = {'NaN': math.nan, 'Infinity': math.inf, '-Infinity': -math.inf}


def _plain(value):
  """A scalar of JAX or NumPy as Python's own."""
  return value.item() if hasattr(value, 'item') else value


def _encode(value):
  if isinstance(value, float) and not math.isfinite(value):
    return next(n for n, v in NOT_NUMBERS.items() if v == value or v != v and value != value)
  return value


def _decode(value):
  return NOT_NUMBERS.get(value, value) if isinstance(value, str) else value


def import_wandb():
  """The module, which is an extra. Raises Mistake where it is not installed."""
  try:
    import wandb
  except ImportError:
    raise Mistake(
      "wandb is asked for and not installed; try pip install -e '.[wandb]', or no W&B project"
    ) from None
  return wandb
