"""The loop of training, and what it does between steps."""

import functools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable

import jax
import numpy as np
from etils import epath

from gptjax import compiler, corruption, files, hosts, metrics, process, schedule, skips, stability
from gptjax.config import Run
from gptjax.data import dataset, loader
from gptjax.data.corpora import Corpora
from gptjax.data.mixture import Mixture
from gptjax.preemption import Notice, Preempted
from gptjax.saver import Saver
from gptjax.watchdog import Watchdog


class GivenUp(Exception):
  """A state went bad: the run shall go on from before it, and leave out what made it so."""

  def __init__(self, rollback: skips.Rollback):
    super().__init__(rollback.why)
    self.rollback = rollback


class Trainer:
  """The loop. A step's metrics are read while the next step runs; nothing else is waited for.

  A CPU alone has run it when the call returns. There they are read at once, or its time would be
  charged to the step before.
  """

  def __init__(
    self,
    run: Run,
    train_step: Callable,
    corpora: Corpora,
    mixed: Mixture,
    mesh: jax.sharding.Mesh,
    writer: metrics.MetricsWriter,
    bar: metrics.ProgressBar,
    workdir: epath.Path,
  ):
    self.run, self.corpora, self.mesh = run, corpora, mesh
    self.writer, self.bar, self.workdir = writer, bar, workdir
    self.shape = run.program.shape
    self.train_step = train_step
    options = compiler.options(mesh.devices.flat[0].platform)
    self.eval_step = hosts.compiled_by_all(jax.jit(run.program.eval_step, compiler_options=options))
    self.copies_agree = corruption.comparing()
    self.repeats = corruption.repeating(run.program.train_step, options)
    self.windows = corpora.stream(mixed, run.program.seed)
    self.waits = process.waits_for(mesh.devices.flat[0])
    self.unread = None  # a step, its rate, and its metrics, which may still be being computed
    self.clock = time.perf_counter()  # when the time began that the unread step is charged with
    self.warm = False  # whether a step has run, so that the next one's time is not a compilation
    self.tracing = ''  # the folder of the trace that is being taken
    self.ending = hosts.Request('end')
    self.streak = 0  # of bad steps, as far as they were read

  def train(
    self,
    state: dict,
    steps: Iterable[schedule.Step],
    start: int,
    end: int,
    saver: Saver,
    notice: Notice,
    watchdog: Watchdog,
  ) -> None:
    """Takes the steps.

    Args:
      state: consumed from here on.
      steps: those from the state's place on the clock to the end.
      start: where they begin; what is left out there may come before the first.
      end: where the last one ends.
      saver: what saves.
      notice: of the end of this machine.
      watchdog: what hears of each step.

    Raises:
      Preempted: after the notice, when all is saved.
      GivenUp: after too many bad steps in a row.
    """
    run = self.run
    watchdog.beat('the first step of this start')
    checks = False  # whether the machine is to be checked before the next step
    for step, batch in loader.prefetch(self.batch, steps, run.prefetch):
      self.trace(step)
      if checks:
        self.read()
        self.copies_agree(state)
        self.repeats(state, *batch)
        self.clock = time.perf_counter()
      # What comes due in what is left out is done after the step behind it.
      due, start = functools.partial(schedule.due, start=start, end=step.end), step.end
      checks = due(run.check_every)
      state, measured = self.train_step(state, *batch)
      before = self.read()
      self.unread = step, batch[-1], measured
      if before or self.waits and self.read():
        watchdog.warm()
      watchdog.beat(f'step {step.number}, sequences {step.start:,} to {step.end - 1:,}')
      last = step.end == end
      if last or due(run.eval_every):
        self.read()
        self.validate(state['params'], step)
      if notice.at:
        self.ending.ask(step.number, str(notice.at))
      ends = self.ending.due(step.number)
      again = saver.again(step)
      if last or ends or again or due(run.save_every):
        self.read()
        # In a streak nothing changes but the clock, and good checkpoints would make room for it.
        if saves := last or not self.streak:
          self.save(saver, step, state, last=last or bool(ends))
      if ends and not last:
        after = f'{time.time() - float(ends):.1f} s after it came'
        told = f'sequence {step.end:,} was saved {after}'
        if not saves:
          told = f'nothing was saved in a streak of bad steps, {after}'
        raise Preempted(f'SIGTERM: {told}')
    self.trace(None)

  def save(self, saver: Saver, step: schedule.Step, state: dict, *, last: bool) -> None:
    """Saves, when the metrics are on disk: no checkpoint is ahead of them."""
    self.writer.sync()
    seconds = saver.save(step, state, last=last)
    self.writer.write({'kind': 'save', **self.at(step), 'seconds': seconds})
    self.clock = time.perf_counter()

  def at(self, step: schedule.Step) -> dict:
    """The clock after a step, as records have it."""
    return {
      'step': step.number,
      'sequences': step.end,
      'tokens': step.end * self.shape.context,
    }

  def batch(self, step: schedule.Step) -> tuple:
    """What the compiled step takes, made in another thread; the rate is that of the step's end."""
    run = self.run
    tokens = loader.place(
      self.windows, step.start, step.rows, run.slices, run.microbatch, self.mesh
    )
    rate = schedule.at(run.lr, step.end)
    return tokens, np.int32(step.start), np.int32(step.rows), rate

  def read(self) -> bool:
    """Waits for the metrics of the unread step and writes them; returns whether there was one."""
    if not self.unread:
      return False
    (step, rate, measured), self.unread = self.unread, None
    measured = jax.device_get(measured)
    judged, streak, since = (int(measured.pop(name)) for name in ('judged', 'streak', 'since'))
    now = time.perf_counter()
    seconds, self.clock = now - self.clock, now
    tokens = step.rows * self.shape.context
    record = {
      'kind': 'train',
      **self.at(step),
      'batch': step.rows,
      'lr': float(rate),
      **{name: float(value) for name, value in measured.items()},
      'seconds': seconds,
    }
    if self.warm:
      device = self.mesh.devices.flat[0].device_kind
      speed = tokens / seconds
      used = metrics.mfu(self.shape.train_flops, speed, device, self.mesh.size)
      memory = metrics.peak_memory_bytes()
      record |= {'tokens_per_second': speed, 'mfu': used, 'peak_bytes': memory}
    self.warm = True
    self.writer.write(record)
    self.bar.update(record)
    self.streak = streak
    if judged != stability.GOOD:
      self.leave_out(step, record['loss'], stability.TOLD[judged], streak, since)
    return True

  def leave_out(self, step: schedule.Step, loss: float, why: str, streak: int, since: int) -> None:
    """Tells of a step that was not taken; gives the state up after too many in a row.

    Raises:
      GivenUp: from the first one of them on.
    """
    told = {'start': step.start, 'loss': loss, 'why': why, 'streak': streak}
    self.writer.write({'kind': 'skip', **self.at(step), **told})
    self.bar.say(
      f'skipped  step {step.number}, sequences {step.start:,} to {step.end - 1:,}: {why}; '
      f'{streak} in a row'
    )
    if streak >= self.run.streak:
      raise GivenUp(skips.Rollback(since, step.end, why))

  def validate(self, params: dict, step: schedule.Step) -> None:
    """Writes the mean loss over the held-out windows of each source, and of their mixture."""
    losses, counts, began = {}, {}, time.perf_counter()
    for name, windows in self.corpora.held_out.items():
      counts[name] = min(len(windows), self.run.eval_sequences)
      losses[name] = self.loss(params, windows, counts[name])
    apart = {}
    if len(losses) > 1:
      apart = {f'loss/{name}': loss for name, loss in losses.items()}
    self.writer.write(
      {
        'kind': 'validation',
        **self.at(step),
        'loss': self.corpora.mean(losses),
        'bits_per_byte': self.corpora.bits_per_byte(losses),
        'windows': sum(counts.values()),
        'seconds': time.perf_counter() - began,
        **apart,
      }
    )
    self.clock = time.perf_counter()

  def loss(self, params: dict, windows: dataset.Windows, count: int) -> float:
    """The mean loss in nats per token over the first `count` windows, in their own order."""
    rows, total, unread = self.run.microbatch * self.run.slices, 0.0, None
    for start in range(0, count, rows):
      mine = min(rows, count - start)
      token_gbl = loader.place(
        windows, start, mine, self.run.slices, self.run.microbatch, self.mesh
      )
      value = self.eval_step(params, token_gbl, np.int32(mine))
      total += float(unread) if unread is not None else 0.0
      unread = value
    return (total + float(unread)) / (count * self.shape.context)

  def trace(self, step: schedule.Step | None) -> None:
    """Starts and ends the profiler's trace around the steps that the config names."""
    wanted = step is not None and step.number in self.run.profile
    if wanted != bool(self.tracing):
      self.read()
      if wanted:
        self.tracing = str(self.workdir / 'profile')
        if files.in_bucket(self.workdir):  # where the profiler cannot write
          self.tracing = tempfile.mkdtemp(prefix='gptjax-profile-')
        jax.profiler.start_trace(self.tracing)
      else:
        self.close()
      self.clock = time.perf_counter()

  def close(self) -> None:
    """Ends a trace that is being taken; may be called twice."""
    folder, self.tracing = self.tracing, ''
    if folder:
      jax.profiler.stop_trace()
      if files.in_bucket(self.workdir):
        files.copy(folder, self.workdir / 'profile')
        shutil.rmtree(folder)
