"""`python -m gptjax.train --config=configs/gpt3.py:125m --config.workdir=…` trains, or goes on."""

import contextlib
import dataclasses
import json
import operator
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
from etils import epath
from ml_collections import ConfigDict

from gptjax import (
  ahead,
  checkpoint,
  compiler,
  files,
  flags,
  hosts,
  journal,
  metrics,
  preemption,
  process,
  skips,
  summary,
  trained,
)
from gptjax.config import Run, check_knobs, resolve
from gptjax.data import tokenizer
from gptjax.data.corpora import Corpora, open_all
from gptjax.data.mixture import Mixture, Stage
from gptjax.errors import mistake, raise_all, told_as
from gptjax.lease import Lease
from gptjax.loop import GivenUp, Trainer
from gptjax.saver import Saver
from gptjax.watchdog import Watchdog

SMALLER = 'more devices with --config.mesh.fsdp, or a smaller model'


def main(config: ConfigDict) -> None:
  """Trains to `train_tokens`, from the last checkpoint in the workdir if there is one."""
  check_knobs(config)
  compiler.fix_order(config.deterministic)
  found = hosts.join(config.hosts)
  devices = process.devices()
  if found:
    hosts.say(f'hosts    {jax.process_count()}, {found}')
  code = 0
  with hosts.leaving_at_once():
    try:
      train(config, devices)
    except preemption.Preempted as e:
      code = preemption.AGAIN
      if hosts.first():
        print(f'ended    {e}; the same command goes on from there', file=sys.stderr, flush=True)
  if code:
    sys.exit(code)


def train(config: ConfigDict, devices: Sequence[jax.Device]) -> None:
  """The same, once all processes are there.

  Raises:
    Preempted: when all is saved, since SIGTERM came.
  """
  run = resolve(config, devices)
  corpora = open_all(config.data.sources, run.program.shape)
  if config.log.wandb:
    metrics.import_wandb()  # before anything is made
  workdir = files.folder(config.workdir)
  wanted, fix = 'a folder to read and write in', 'making room, or --config.workdir=runs/…'
  with told_as(f'workdir {workdir}', wanted, fix, *files.failures()):
    since = time.perf_counter() - process.age()
    files.make(workdir)
    with Lease(workdir, enabled=hosts.first()), preemption.listening() as notice:
      while True:
        try:
          return go_on(config, run, corpora, workdir, since, notice)
        except GivenUp as e:
          since = time.perf_counter()
          roll_back(run, workdir, e.rollback)


def go_on(
  config: ConfigDict,
  run: Run,
  corpora: Corpora,
  workdir: epath.Path,
  since: float,
  notice: preemption.Notice,
) -> None:
  """Trains in a workdir, from the last checkpoint there if there is one.

  Args:
    since: when this start began, of `time.perf_counter`.
    notice: of the end of this machine.
  """
  files.make(workdir / 'checkpoints')
  ahead.cache_in(workdir, config.compute.cache)
  hosts.meet()
  commit = git_commit()
  saved_in = checkpoint.Checkpoints(workdir / 'checkpoints', run.save_keep, run.save_keep_every)
  with saved_in as checkpoints, told_from_where(checkpoints):
    rollbacks = skips.read(workdir)
    for each in rollbacks:  # while the state was bad
      checkpoints.drop_within(each.start, each.stop)
    start, taken, starts, stages, changed = checkpoints.newest_whole() or 0, 0, [], [], []
    settings, names = settings_of(config, corpora, {}), {}
    # Before the first process changes anything that the others still look at.
    reached = journal.reached(workdir)
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
    elif not any(r.start == 0 for r in rollbacks):
      check_nothing_lost(workdir, run, reached)
    origin = None
    if run.init_from and not start:
      origin = origin_of(run, corpora)
    if not stages or stages[-1].weights != corpora.stage:
      stages.append(Stage(start, corpora.stage))
    mixed = Mixture(stages)
    mesh = run.make_mesh()
    skipped = skips.union([*run.skipped, *(range(r.start, r.stop) for r in rollbacks)])
    hosts.say(summary.describe(run, mesh, corpora, mixed, start, taken, skipped))
    for change in changed:
      told = '{setting} was {before}, is {after} from here on'.format_map(change)
      hosts.say(f'change   {told}')
    if start and reached < start:
      hosts.say(f'metrics  none from sequence {reached:,} to {start:,}: {journal.FILE} was cut')
    steps = run.ramp.steps(start, taken, skipped)
    if not run.ramp.steps_left(start, skipped):
      if not start:
        fix = 'another --config.skip_sequences, seed or rate, in another workdir'
        raise mistake('sequences', 'none that are not left out', 'some to train on', fix)
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
    train_step = ahead.step(run, mesh)
    with jax.set_mesh(mesh):
      restoring = time.perf_counter()
      if start:
        state = checkpoints.restore(start, run.program.abstract_state())
        jax.block_until_ready(state)
        if changed or stages[-1].start == start:  # what was usual is so no more
          state |= {'health': jax.jit(run.program.guard.init)()}
      else:
        with told_as('memory', 'enough for the state', SMALLER, jax.errors.JaxRuntimeError):
          if origin:
            like = run.program.abstract_state()['params']
            state = jax.jit(run.program.begin, donate_argnums=0)(origin.load(like))
          else:
            state = jax.jit(lambda: run.program.init(jax.random.key(config.seed)))()
          jax.block_until_ready(state)  # a device may say it only now
      restored = time.perf_counter() - restoring
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
        Watchdog(config.watchdog.seconds, ends=config.watchdog.ends) as watchdog,
      ):
        at = {'step': taken, 'sequences': start, 'tokens': start * run.program.shape.context}
        began = {
          'setup_seconds': time.perf_counter() - since,
          'restore_seconds': restored * bool(start),
          'lost_steps': writer.lost['steps'],
          'heard': writer.lost['heard'],
        }
        writer.write({'kind': 'start', **at, **began})
        if stages[-1].start == start:
          baseline = {'kind': 'baseline', **at, 'loss': corpora.mean(corpora.unigram_nats)}
          writer.write(baseline)
        saver = Saver(checkpoints, record, run.save_failures, bar.say)
        trainer = Trainer(run, train_step, corpora, mixed, mesh, writer, bar, workdir)
        with contextlib.closing(trainer):
          trainer.train(state, steps, start, run.ramp.end(skipped), saver, notice, watchdog)
  if hosts.first():
    print(summary.verdict(workdir, corpora))


def origin_of(run: Run, corpora: Corpora) -> trained.Trained:
  """The model whose weights a new run begins with.

  Raises:
    Mistake: with all in which it is another one than that of the config.
  """
  path, mistakes = run.init_from, []
  origin = trained.look(path)
  for field in dataclasses.fields(run.program.shape):
    there, here = (getattr(shape, field.name) for shape in (origin.shape, run.program.shape))
    if there != here:
      knob = 'pattern or window' if field.name == 'windows' else field.name
      what, fix = f'{field.name} of {path}', f'another --config.model.{knob}'
      mistakes.append(mistake(what, there, f'{here}, as in the config', fix))
  raise_all(mistakes)
  if origin.tokenizer().identity != corpora.first.tokenizer:
    fix = f'preparing it with --config.tokenizer={path}'
    raise mistake(f'tokenizer of {path}', 'another one', "the corpus's", fix)
  return origin


def settings_of(config: ConfigDict, corpora: Corpora, names: Mapping[str, str]) -> dict:
  """What a checkpoint knows of a run, flat, with the names that its corpora had before."""
  return checkpoint.flatten(config.to_dict() | {'corpus': corpora.identity(names)})


def roll_back(run: Run, workdir: epath.Path, bad: skips.Rollback) -> None:
  """Notes what is left out from now on: from the last good checkpoint to the end of the bad steps.

  A checkpoint from which that was done before, and did not help, is good no more.

  Raises:
    Mistake: if that was done as often as it may be, or no good checkpoint is left.
  """
  before = skips.read(workdir)
  told = lambda r: f'sequences {r.start:,} to {r.stop - 1:,} ({r.why})'
  got = f'{run.streak} bad steps in a row, {told(bad)}'
  if before:
    got += ', after leaving out ' + ', '.join(map(told, before))
  fix = 'another seed or a smaller rate, or --config.stability.rollbacks to go on'
  if len(before) >= run.rollbacks:
    raise mistake('stability', got, f'no more than {run.rollbacks} rollbacks', fix)
  tried = {r.start for r in before}
  there = checkpoint.finished(workdir / 'checkpoints')
  good = max((s for s in there if s <= bad.start and s not in tried), default=0)
  # All take what the first one saw: it may be deleting old ones.
  good = int(hosts.all_say(str(good))[0])
  if not good and (tried or bad.start >= first_is_whole(run)):
    raise mistake('stability', got, 'a checkpoint before them that was not tried', fix)
  rollback = dataclasses.replace(bad, start=good)
  hosts.say(f'rollback {told(bad)}: {told(rollback)} are left out from here on')
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


def first_is_whole(run: Run) -> int:
  """Sequences after which the first checkpoint is: when the third is due, as none overtakes."""
  return 3 * max(run.save_every, run.ramp.rungs[-1].batch)


def check_nothing_lost(workdir: epath.Path, run: Run, reached: int) -> None:
  """Raises where metrics reach past checkpoints that are gone: starting anew would erase them too.

  A run that was killed before its first checkpoint was complete may start anew.
  """
  trained = reached - sum(max(0, min(r.stop, reached) - r.start) for r in run.skipped)
  if run.save_every and trained >= first_is_whole(run):
    raise mistake(
      'workdir',
      f'{workdir} without checkpoints, and metrics up to sequence {reached:,}',
      'the checkpoints that they tell of',
      f'another workdir, or moving {journal.FILE} away to start anew',
    )


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
