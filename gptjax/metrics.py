"""What a run tells of itself: records, TensorBoard, W&B, a progress bar, throughput and MFU."""

import collections
import contextlib
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import TextIO

import jax
import tqdm
from etils import epath

from gptjax import files, journal
from gptjax.errors import Mistake

EVENTS_PER_FILE = 50_000  # of TensorBoard's in a bucket: some 4 MB
SEND_SECONDS = 30.0  # after which such a file is sent anew
BEFORE_STEPS = ('start', 'baseline')  # the kinds of records that are written before a first step

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
  """Writes records, flat dicts with `kind`, `step`, `sequences` and `tokens`, wherever asked to.

  They go to the workdir (`journal.Journal`, which drops what lies after `resume_at`), TensorBoard,
  which forgets the same steps, and W&B, which cannot, and shows both. `lost` tells of what is
  dropped: its `steps`, and when the last record of all was `heard`.

  Raises:
    Mistake: wandb is asked for and not installed, or the records are damaged.
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
    self._log = self._tensorboard = self._wandb = None
    self.lost = {'steps': 0, 'heard': None}
    if not enabled:
      return
    wandb = import_wandb() if wandb_project else None
    workdir = files.folder(workdir)
    self._log = journal.Journal(workdir, resume_at)
    kept, dropped = self._log.kept, self._log.dropped
    heard = max((r['time'] for r in [*kept, *dropped] if 'time' in r), default=None)
    self.lost = {'steps': sum(r['kind'] == 'train' for r in dropped), 'heard': heard}
    if tensorboard:
      # What TensorBoard has at or after `purge_step` is forgotten. If there is no record to tell
      # the tokens at `resume_at`, nothing can be.
      purge = max(r['tokens'] for r in kept) + 1 if kept else None if resume_at else 0
      self._tensorboard = _TensorBoard(workdir, purge)
    if wandb:
      folder = tempfile.gettempdir() if files.in_bucket(workdir) else str(workdir)
      self._wandb = wandb.init(project=wandb_project, name=workdir.name, dir=folder)
      self._wandb.define_metric('*', step_metric='tokens')

  def write(self, record: dict) -> None:
    """Writes one record with the `time`; values that are None are left out."""
    if not self._log:
      return
    record = record | {'time': round(time.time(), 3)}
    record = {name: _plain(value) for name, value in record.items() if value is not None}
    kind, tokens = record['kind'], record['tokens']
    assert journal.REQUIRED.keys() <= record.keys(), record
    self._log.append(record)
    scalars = {
      f'{kind}/{name}': value
      for name, value in record.items()
      if name not in ('tokens', 'time') and isinstance(value, int | float)
    }
    if self._tensorboard:
      self._tensorboard.add(scalars, tokens, wait=kind in BEFORE_STEPS)
    if self._wandb:
      self._wandb.log(scalars | {'tokens': tokens})

  def sync(self) -> None:
    """Returns when what was written is safe, whatever happens to the machine."""
    if self._log:
      self._log.sync()

  def close(self) -> None:
    """Ends all that is written to; may be called twice."""
    with contextlib.ExitStack() as every:  # each of them, though another fails
      for sink in (self._log, self._tensorboard):
        if sink:
          every.callback(sink.close)
      if self._wandb:
        every.callback(self._wandb.finish)
    self._log = self._tensorboard = self._wandb = None

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *_) -> None:
    self.close()


def _tensorboardx():
  """The module, without PyTorch, which it imports for seconds and in vain where it is installed."""
  hidden = sys.modules.setdefault('torch', None) is None
  try:
    import tensorboardX
  finally:
    if hidden:
      del sys.modules['torch']
  return tensorboardX


class _TensorBoard:
  """Files of TensorBoard in a workdir; for a bucket they are made here, and sent now and then.

  Opened when there is something that need not wait, since for that a lot is imported, which a
  run's first step would wait for.
  """

  def __init__(self, workdir: epath.Path, purge: int | None):
    self._to = workdir / 'tensorboard'
    self._remote = files.in_bucket(workdir)
    self._folder = tempfile.mkdtemp(prefix='gptjax-tensorboard-') if self._remote else self._to
    self._thread = futures.ThreadPoolExecutor(1, 'tensorboard')
    self._sending: futures.Future | None = None
    self._purge, self._writer, self._waiting = purge, None, []

  def _open(self, purge):
    self._written, self._sent = 0, time.monotonic()
    self._writer = _tensorboardx().SummaryWriter(
      str(self._folder),
      purge_step=purge,
      flush_secs=10,
      # Its own file names differ by the second only, and it overwrites one that is there.
      filename_suffix=f'.{time.time_ns()}',
    )

  def add(self, scalars: Mapping[str, float], tokens: int, wait: bool) -> None:
    """Adds numbers; to `wait` is to be written together with what comes next."""
    self._waiting.append((scalars, tokens))
    if not wait:
      self._write()

  def _write(self):
    if self._writer is None:
      self._open(self._purge)
    for scalars, tokens in self._waiting:
      for name, value in scalars.items():
        self._writer.add_scalar(name, value, tokens)
      self._written += len(scalars)
    self._waiting.clear()
    if not self._remote or time.monotonic() - self._sent < SEND_SECONDS:
      return
    if self._sending is None or self._sending.done():
      if self._written >= EVENTS_PER_FILE:
        self._writer.close()
        self._open(None)
      self._writer.flush()
      self._sent = time.monotonic()
      # What goes wrong there goes well when the files are sent again.
      self._sending = self._thread.submit(self._send)

  def _send(self):
    """Sends all files, and deletes those that nothing more is written to."""
    *ended, last = sorted(pathlib.Path(self._folder).iterdir())
    files.copy(self._folder, self._to)
    for path in ended:
      path.unlink()

  def close(self) -> None:
    if self._waiting:
      self._write()
    if self._writer:
      self._writer.close()
    self._thread.shutdown()
    if not self._remote:
      return
    try:
      files.copy(self._folder, self._to)
    except Exception as e:  # of whatever store it is
      told = f"FAILED   {type(e).__name__}: TensorBoard's files are still in {self._folder}"
      print(told, file=sys.stderr, flush=True)
    else:
      shutil.rmtree(self._folder)


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


def _plain(value):
  """A scalar of JAX or NumPy as Python's own."""
  return value.item() if hasattr(value, 'item') else value


def import_wandb():
  """The module, which is an extra. Raises Mistake where it is not installed."""
  try:
    import wandb
  except ImportError:
    raise Mistake(
      "wandb is asked for and not installed; try pip install -e '.[wandb]', or no W&B project"
    ) from None
  return wandb
