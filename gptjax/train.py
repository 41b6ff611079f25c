"""`python -m gptjax.train --config=configs/gpt3.py:125m --config.workdir=…` trains, or goes on."""

import contextlib
import dataclasses
import json
import operator
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from gptjax import (
  ahead,
  checkpoint,
  files,
  flags,
  hosts,
  metrics,
  schedule,
  sharding,
  skips,
  stability,
  summary,
)
from gptjax.config import Run, check_knobs, resolve
from gptjax.data import dataset, loader, tokenizer
from gptjax.data.corpora import Corpora, open_all
from gptjax.data.mixture import Mixture, Stage
from gptjax.errors import mistake, told_as

SMALLER = 'more devices with --config.mesh.fsdp, or a smaller model'


def main(config: ConfigDict) -> None:
  """Trains to `train_tokens`, from the last checkpoint in the workdir if there is one."""
  check_knobs(config)
  found = hosts.join(config.hosts)
  with told_as('devices', 'one that JAX finds', 'another JAX_PLATFORMS', RuntimeError):
    devices = jax.devices()
  if found:
    hosts.say(f'hosts    {jax.process_count()}, {found}')
  with hosts.leaving_at_once():
    train(config, devices)


def train(config: ConfigDict, devices: Sequence[jax.Device]) -> None:
  """The same, once all processes are there."""
  run = resolve(config, devices)
  corpora = open_all(config.data.sources, run.program.shape)
  if config.log.wandb:
    metrics.import_wandb()  # before anything is made
  workdir = epath.Path(config.workdir)
  wanted, fix = 'a folder to make and write in', 'more room, or --config.workdir=runs/…'
  with told_as(f'workdir {workdir}', wanted, fix, OSError):
    while True:
      try:
        return go_on(config, run, corpora, workdir)
      except GivenUp as e:
        roll_back(run, workdir, e.rollback)


def go_on(config: ConfigDict, run: Run, corpora: Corpora, workdir: epath.Path) -> None:
  """Trains in a workdir, from the last checkpoint there if there is one."""
  (workdir / 'checkpoints').mkdir(parents=True, exist_ok=True)
  if not os.access(workdir, os.W_OK):
    raise PermissionError('not writable')
  hosts.meet()
  commit = git_commit()
  saved_in = checkpoint.Checkpoints(workdir / 'checkpoints', config.save.keep)
  with contextlib.closing(saved_in) as checkpoints, told_from_where(checkpoints):
    rollbacks = skips.read(workdir)
    for each in rollbacks:  # while the state was bad
      checkpoints.drop_within(each.start, each.stop)
    start, taken, starts, stages, changed = checkpoints.newest_whole() or 0, 0, [], [], []
    settings, names = settings_of(config, corpora, {}), {}
    # Before the first process changes anything that the others still look at.
    reached = metrics.reached(workdir)
    about = {'hosts': '', 'start': start, 'commit': commit, 'rollbacks': len(rollbacks)}
    hosts.check_alike(settings | about, workdir)
    if start:
      with checkpoints.damage_told(start):
        saved = checkpoints.record(start)
        names = dict(saved['names'])
        settings = settings_of(config, corpora, names)
        changed = checkpoint.changes(saved['settings'], settings, config.resume.accept_changes)
        taken, starts = operator.index(saved['step']), [*saved['starts']]
        stages = [Stage(**stage) for stage in saved['stages']]
    else:
      if not rollbacks:
        check_nothing_lost(workdir, run, reached)
    if not stages or stages[-1].weights != corpora.stage:
      stages.append(Stage(start, corpora.stage))
    mixed = Mixture(stages)
    mesh = sharding.make_mesh(**run.mesh, across=run.across)
    train_step = ahead.step(run, mesh)
    skipped = skips.union([*run.skipped, *(range(r.start, r.stop) for r in rollbacks)])
    hosts.say(summary.describe(run, mesh, corpora, mixed, start, taken, skipped))
    for change in changed:
      told = '{setting} was {before}, is {after} from here on'.format_map(change)
      hosts.say(f'change   {told}')
    if start and reached < start:
      hosts.say(f'metrics  none from sequence {reached:,} to {start:,}: {metrics.FILE} was cut')
    steps = run.ramp.steps(start, taken, skipped)
    if not run.ramp.steps_left(start, skipped):
      hosts.say(f'nothing is left to train: {start:,} of {run.ramp.total:,} sequences')
      if hosts.first():
        print(summary.verdict(workdir, corpora))
      return
    starts = [*starts, {'sequences': start, 'git': commit, 'changes': changed}]
    record = {
      'settings': settings,
      'starts': starts,
      'stages': [dataclasses.asdict(stage) for stage in stages],
      'names': corpora.names | names,
    }
    with jax.set_mesh(mesh):
      if start:
        state = checkpoints.restore(start, run.program.abstract_state())
      else:
        with told_as('memory', 'enough for the state', SMALLER, jax.errors.JaxRuntimeError):
          state = jax.jit(lambda: run.program.init(jax.random.key(config.seed)))()
      if hosts.first():
        write_record(workdir, config, record, corpora.first)
      with (
        metrics.MetricsWriter(
          workdir,
          resume_at=start,
          tensorboard=config.log.tensorboard,
          wandb_project=config.log.wandb,
          enabled=hosts.first(),
        ) as writer,
        metrics.ProgressBar(
          run.ramp.total,
          start,
          run.program.shape.context,
          enabled=config.log.progress and hosts.first(),
        ) as bar,
      ):
        if stages[-1].start == start:
          at = {'step': taken, 'sequences': start, 'tokens': start * run.program.shape.context}
          baseline = {'kind': 'baseline', 'loss': corpora.mean(corpora.unigram_nats)} | at
          writer.write(baseline)
        trainer = Trainer(run, train_step, corpora, mixed, mesh, writer, bar, workdir)
        clock = lambda step: {'sequences': step.end, 'step': step.number}
        save = lambda step, state: checkpoints.save(step.end, state, record | clock(step))
        end = run.ramp.end(skipped)
        trainer.train(state, steps, end, config.data.prefetch, save)
  if hosts.first():
    print(summary.verdict(workdir, corpora))


def settings_of(config: ConfigDict, corpora: Corpora, names: Mapping[str, str]) -> dict:
  """What a checkpoint knows of a run, flat, with the names that its corpora had before."""
  return checkpoint.flatten(config.to_dict() | {'corpus': corpora.identity(names)})


class GivenUp(Exception):
  """A state went bad: the run shall go on from before it, and leave out what made it so."""

  def __init__(self, rollback: skips.Rollback):
    super().__init__(rollback.why)
    self.rollback = rollback


def roll_back(run: Run, workdir: epath.Path, rollback: skips.Rollback) -> None:
  """Notes what is left out from now on.

  Raises:
    Mistake: if that was done as often as it may be.
  """
  before = skips.read(workdir)
  told = lambda r: f'sequences {r.start:,} to {r.stop - 1:,} ({r.why})'
  if len(before) >= run.rollbacks:
    got = f'{run.streak} bad steps in a row: {told(rollback)}'
    got += ', after rolling back for ' + ', '.join(map(told, before)) * bool(before)
    fix = 'another seed or a smaller rate, or --config.stability.rollbacks to go on'
    raise mistake('stability', got, f'no more than {run.rollbacks} rollbacks', fix)
  hosts.say(f'rollback {told(rollback)} are left out from here on')
  hosts.meet()  # all have read the file that now changes
  if hosts.first():
    skips.add(workdir, rollback)
  hosts.meet()


@contextlib.contextmanager
def told_from_where(checkpoints: checkpoint.Checkpoints) -> Iterator[None]:
  """Says on Ctrl-C from where the run goes on."""
  try:
    yield
  except KeyboardInterrupt:
    saved = checkpoints.wait()
    where = f'the last checkpoint, sequence {saved:,}' if saved else 'the start: none was saved yet'
    if hosts.first():
      print(f'stopped; the same command goes on from {where}', file=sys.stderr, flush=True)
    raise


def check_nothing_lost(workdir: epath.Path, run: Run, reached: int) -> None:
  """Raises where metrics reach past checkpoints that are gone: starting anew would erase them too.

  A run that was killed before its first checkpoint was complete may start anew.
  """
  # When the third checkpoint is due, the first is complete: none starts before the last is.
  if run.save_every and reached >= 3 * max(run.save_every, run.ramp.rungs[-1].batch):
    raise mistake(
      'workdir',
      f'{workdir} without checkpoints, and metrics up to sequence {reached:,}',
      'the checkpoints that they tell of',
      f'another workdir, or moving {metrics.FILE} away to start anew',
    )


class Trainer:
  """The loop. A step's metrics are read while the next step runs; nothing else is waited for."""

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
    self.eval_step = jax.jit(run.program.eval_step)
    self.windows = corpora.stream(mixed, run.program.seed)
    self.unread = None  # a step, its rate, and its metrics, which may still be being computed
    self.clock = time.perf_counter()  # when the time began that the unread step is charged with
    self.warm = False  # whether a step has run, so that the next one's time is not a compilation
    self.tracing = False

  def train(
    self, state: dict, steps: Iterable[schedule.Step], end: int, ahead: int, save: Callable
  ) -> None:
    """Takes the steps.

    Args:
      state: consumed from here on.
      steps: those from the state's place on the clock to the end.
      end: where the last one ends.
      ahead: batches to make ahead.
      save: what to call as save(step, state) when a checkpoint is due.
    """
    run = self.run
    for step, batch in loader.prefetch(self.batch, steps, ahead):
      self.trace(step)
      state, measured = self.train_step(state, *batch)
      self.read()
      self.unread = step, batch[-1], measured
      last = step.end == end
      if last or schedule.due(run.eval_every, step.start, step.end):
        self.read()
        self.validate(state['params'], step)
      if last or schedule.due(run.save_every, step.start, step.end):
        self.read()  # first, so that no checkpoint is ahead of the metrics on disk
        save(step, state)
        self.clock = time.perf_counter()
    self.trace(None)

  def batch(self, step: schedule.Step) -> tuple:
    """What the compiled step takes, made in another thread; the rate is that of the step's end."""
    run = self.run
    tokens = loader.place(
      self.windows, step.start, step.rows, run.slices, run.microbatch, self.mesh
    )
    rate = schedule.at(run.lr, step.end)
    return tokens, np.int32(step.start), np.int32(step.rows), rate

  def read(self) -> None:
    """Waits for the metrics of the unread step, if there is one, and writes them."""
    if not self.unread:
      return
    (step, rate, measured), self.unread = self.unread, None
    measured = jax.device_get(measured)
    judged, streak, since = (int(measured.pop(name)) for name in ('judged', 'streak', 'since'))
    now = time.perf_counter()
    seconds, self.clock = now - self.clock, now
    tokens = step.rows * self.shape.context
    record = {
      'kind': 'train',
      'step': step.number,
      'sequences': step.end,
      'tokens': step.end * self.shape.context,
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
    if judged != stability.GOOD:
      self.leave_out(step, record['loss'], stability.TOLD[judged], streak, since)

  def leave_out(self, step: schedule.Step, loss: float, why: str, streak: int, since: int) -> None:
    """Tells of a step that was not taken; gives the state up after too many in a row.

    Raises:
      GivenUp: from the first one of them on.
    """
    clock = {'step': step.number, 'sequences': step.end, 'tokens': step.end * self.shape.context}
    told = {'start': step.start, 'loss': loss, 'why': why, 'streak': streak}
    self.writer.write({'kind': 'skip'} | clock | told)
    self.bar.say(
      f'skipped  step {step.number}, sequences {step.start:,} to {step.end - 1:,}: {why}; '
      f'{streak} in a row'
    )
    if streak >= self.run.streak:
      raise GivenUp(skips.Rollback(since, step.end, why))

  def validate(self, params: dict, step: schedule.Step) -> None:
    """Writes the mean loss over the held-out windows of each source, and of their mixture."""
    losses, counts = {}, {}
    for name, windows in self.corpora.held_out.items():
      counts[name] = min(len(windows), self.run.eval_sequences)
      losses[name] = self.loss(params, windows, counts[name])
    apart = {}
    if len(losses) > 1:
      apart = {f'loss/{name}': loss for name, loss in losses.items()}
    self.writer.write(
      {
        'kind': 'validation',
        'step': step.number,
        'sequences': step.end,
        'tokens': step.end * self.shape.context,
        'loss': self.corpora.mean(losses),
        'bits_per_byte': self.corpora.bits_per_byte(losses),
        'windows': sum(counts.values()),
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
    if wanted != self.tracing:
      self.read()
      if wanted:
        jax.profiler.start_trace(str(self.workdir / 'profile'))
      else:
        jax.profiler.stop_trace()
      self.tracing, self.clock = wanted, time.perf_counter()


def write_record(workdir: epath.Path, config: ConfigDict, record: dict, corpus) -> None:
  """Puts the config, the commit and the tokenizer where the run is."""
  files.write_whole(workdir / 'config.json', config.to_json_best_effort(indent=2))
  files.write_whole(workdir / 'record.json', json.dumps(record, indent=2))
  tokenizer.load(corpus.folder).save(workdir)


def git_commit() -> str:
  """The commit of this code, with `+` if a file of it was changed; '' outside a repository."""
  if shutil.which('git') is None:
    return ''
  here = ['git', '-C', str(Path(__file__).parent)]
  git = lambda *args: subprocess.run(
    [*here, *args], capture_output=True, text=True, check=False
  ).stdout.strip()
  commit = git('rev-parse', 'HEAD')
  return commit + '+' * bool(commit and git('status', '--porcelain', '-uno'))


if __name__ == '__main__':
  flags.run(main, __doc__)
