"""Checkpoints by Orbax: the state, and what it takes to know whether one may go on from it."""

import contextlib
import itertools
import json
import logging
import os
import sys
from collections.abc import Iterator
from concurrent import futures

import jax
import orbax.checkpoint as ocp
from etils import epath

from gptjax import files, hosts, integrity, schedule
from gptjax.errors import Mistake, mistake, raise_all, told_as

# What a resume may change, by the longest prefix of a setting's name. FREE are knobs of the
# machine. NEVER would make another model, or another stream of tokens that only looks the same.
# The rest is the recipe, which changes only if asked for.
FREE, NEVER, RECIPE = 'free', 'never', 'recipe'
ASIDE = 'damaged'  # a folder beside the checkpoints
UNFINISHED = 'unfinished'  # how the names of some in it end
POLICY = {
  '': RECIPE,
  'workdir': FREE,
  'hosts': FREE,
  'mesh': FREE,
  'compute': FREE,
  'log': FREE,
  'save': FREE,
  'eval': FREE,
  'profile': FREE,
  'watchdog': FREE,
  'check': FREE,
  'resume': FREE,
  'data.sources': FREE,  # folders may move; what is in them is the corpus
  'data.prefetch': FREE,
  'seed': NEVER,
  'init_from': NEVER,
  'deterministic': FREE,
  'model': NEVER,
  'stability.window': NEVER,  # the shape of what the guard knows
  'model.dropout': RECIPE,
  'corpus.tokenizer': NEVER,
  'corpus.context': NEVER,
  'corpus.sources': RECIPE,
}


class Checkpoints:
  """The checkpoints of a run, each named by the sequences consumed.

  A checkpoint is the state (nested dicts of arrays, whatever the mesh), a record as JSON, and lists
  of its files, written last (`integrity`): without them it is not finished.
  """

  def __init__(self, folder: str | os.PathLike, keep: int, keep_every: int = 0):
    """Keeps the newest, and besides the first at or after each multiple of `keep_every`."""
    self._folder = files.folder(folder)
    # It deletes none: the old ones go when the newest has its lists. In a bucket it would delete
    # what is unfinished, which goes aside here, and on a disk has another name.
    options = ocp.CheckpointManagerOptions(
      cleanup_tmp_directories=not files.in_bucket(self._folder), enable_async_checkpointing=True
    )
    self._aside = self._folder.with_name(ASIDE)
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=options,
      item_handlers={
        # Of trained weights zstd spares a tenth at most, and it takes longer than all the rest.
        'state': ocp.PyTreeCheckpointHandler(use_compression=False),
        'record': ocp.JsonCheckpointHandler(),
      },
    )
    self._keep, self._keep_every = keep, keep_every
    self._thread = futures.ThreadPoolExecutor(1, 'checkpoints')
    self._pending: futures.Future | None = None
    self._stale = False  # whether Orbax counts a checkpoint that is not there

  def latest(self) -> int | None:
    """Sequences consumed at the last finished checkpoint, None if there is none."""
    return max(finished(self._folder), default=None)

  def newest_whole(self) -> int | None:
    """The same of the last one whose files are as they were written; those after it go aside.

    Raises:
      Mistake: if there are checkpoints, and damage in all that are finished.
    """
    bad, there = {}, sorted(_steps(self._folder), reverse=True)
    if len(set(hosts.all_say(str(there)))) > 1:
      got = f'{there} here, and others in another process'
      raise mistake('checkpoints', got, 'one workdir for all', 'a shared file system')
    for sequences in there:
      if not (why := self._damage(sequences)):
        break
      bad[sequences] = why
    else:
      sequences = None
    damaged = {s: why for s, why in bad.items() if not why.endswith(integrity.UNFINISHED)}
    if damaged and sequences is None:
      got = ', '.join(f'{s}: {why}' for s, why in damaged.items())
      fix = 'a copy of one, or moving them away to start anew'
      raise mistake(f'checkpoints in {self._folder}', got, 'one that is whole', fix)
    if len(damaged) < len(bad):
      if hosts.first():
        self._forget_unfinished()
      hosts.meet()  # before the others look at what is there
    for each, why in bad.items():
      self._put_aside(each, why)
    return sequences

  def _damage(self, sequences) -> str:
    folder = self._folder / str(sequences)
    mine = integrity.damage(folder, jax.process_index(), jax.process_count())
    return next(filter(None, hosts.all_say(mine)), '')

  def _forget_unfinished(self) -> None:
    """Deletes those of earlier starts: every kill may leave one, and they would fill the disk."""
    for name in files.names(self._aside):
      if name.endswith(f'.{UNFINISHED}'):
        (self._aside / name).rmtree()
        (self._aside / f'{name}.txt').unlink(missing_ok=True)

  def _put_aside(self, sequences, why) -> None:
    """Moves one away: it may be of use to a person, and is in the way of the next at its place."""
    told, names = 'DAMAGED ', (f'{sequences}.{i}' for i in itertools.count())
    if why.endswith(integrity.UNFINISHED):
      told, names = 'aside   ', [f'{sequences}.{UNFINISHED}']
    taken = files.names(self._aside)
    to = self._aside / next(name for name in names if name not in taken)
    hosts.say(f'{told} checkpoint {sequences:,}: {why}; it is now {to.parent.name}/{to.name}')
    hosts.meet()  # all have looked
    if hosts.first():
      files.make(self._aside)
      files.write_whole(to.with_name(f'{to.name}.txt'), f'{why}\n')
      files.move(self._folder / str(sequences), to)
    hosts.meet()
    self._manager.reload()

  def drop_within(self, start: int, stop: int) -> None:
    """Deletes those after `start`, up to `stop`."""
    hosts.meet()
    if hosts.first():
      for sequences in _steps(self._folder):
        if start < sequences <= stop:
          (self._folder / str(sequences)).rmtree()
    hosts.meet()
    self._manager.reload()

  def record(self, sequences: int) -> dict:
    """What was saved beside the state."""
    args = ocp.args.Composite(record=ocp.args.JsonRestore())
    with self.damage_told(sequences):
      return self._manager.restore(sequences, args=args)['record']

  def restore(self, sequences: int, abstract: dict) -> dict:
    """The state, laid out as the abstract state says: any mesh restores from any other."""
    args = ocp.args.Composite(state=_restore(abstract))
    with self.damage_told(sequences):
      return self._manager.restore(sequences, args=args)['state']

  def damage_told(self, sequences: int) -> contextlib.AbstractContextManager:
    """Turns whatever goes wrong with what a checkpoint holds into a Mistake that names it."""
    return _damage_told(self._manager, sequences)

  def save(self, sequences: int, state: dict, record: dict) -> bool:
    """Starts to save, when the save before is done, and returns when the state was copied.

    Returns:
      Whether there was a save before that `poll` has not told of, and it went well.

    Raises:
      Mistake: what went wrong with it, or with the one before, if `poll` has not told yet.
    """
    before = self._pending is not None
    self._settle()
    args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), record=ocp.args.JsonSave(record))
    with self._failure_told():
      if self._stale:
        self._manager.reload()
        self._stale = False
      self._manager.save(sequences, args=args)
    self._pending = self._thread.submit(self._finish, sequences)
    return before

  def _finish(self, sequences) -> None:
    """Waits until a checkpoint is on disk, lists its files, and deletes what need not be kept."""
    with self._failure_told():
      self._manager.wait_until_finished()
      folder = self._folder / str(sequences)
      integrity.write_list(folder, jax.process_index(), jax.process_count())
      if hosts.first():
        for old in self._surplus():
          (self._folder / str(old)).rmtree()

  def _surplus(self) -> set[int]:
    there = sorted(finished(self._folder))
    pairs = zip([0, *there], there, strict=False)
    marks = {end for start, end in pairs if schedule.due(self._keep_every, start, end)}
    oldest = (there[-self._keep :] or [0])[0]
    return {s for s in _steps(self._folder) if s < oldest} - marks

  def poll(self) -> tuple[bool, Mistake | None]:
    """Whether a save has ended since this was last asked, and what went wrong with it."""
    if not self._pending or not self._pending.done():
      return False, None
    pending, self._pending = self._pending, None
    failed = pending.exception()
    self._stale |= failed is not None
    if failed and not isinstance(failed, Mistake):
      raise failed
    return True, failed

  def wait(self) -> int | None:
    """Waits until everything is on disk, and returns what `latest` does.

    Raises:
      Mistake: what went wrong with the last save.
    """
    self._settle()
    return self.latest()

  def _settle(self) -> None:
    """The same, and looks at nothing: a bucket may be away."""
    if self._pending:
      futures.wait([self._pending])
    _, failed = self.poll()
    if failed:
      raise failed

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind, *_) -> None:
    try:
      self.close()
    except Mistake as e:
      if kind is None:
        raise
      # What ends the run already is the greater news.
      print(f'FAILED   {e}', file=sys.stderr, flush=True)

  def close(self) -> None:
    """Waits until everything is on disk."""
    try:
      self._settle()
    finally:
      self._thread.shutdown()
      with self._failure_told():
        self._manager.close()

  @contextlib.contextmanager
  def _failure_told(self) -> Iterator[None]:
    fix = 'making room; the same command goes on from the last one that is whole'
    try:
      yield
    except Exception as e:
      if isinstance(e, Mistake) or hosts.lost_a_peer(e):
        raise
      # The first of many writes that failed is told; asyncio would log the others below it.
      logging.getLogger('asyncio').addFilter(lambda log: 'never retrieved' not in log.getMessage())
      # A full disk has many names here.
      with told_as(f'checkpoints in {self._folder}', 'to be written', fix, Exception):
        raise


def _steps(folder: epath.Path) -> list[int]:
  return [int(name) for name in files.names(folder) if name.isdigit()]


def finished(folder: epath.Path) -> list[int]:
  """The checkpoints in a folder whose files are all listed."""
  return [s for s in _steps(folder) if integrity.complete(folder / str(s))]


def load_params(folder: epath.Path, abstract: dict) -> dict:
  """The params alone of the last checkpoint in a folder of checkpoints.

  Raises:
    Mistake: if there is none, or it is damaged.
  """
  folder, options = files.folder(folder), ocp.CheckpointManagerOptions(create=False)
  with ocp.CheckpointManager(folder, options=options, item_names=('state',)) as manager:
    last = max(finished(folder), default=None)
    if last is None:
      raise mistake('checkpoints', f'none in {folder}', 'a complete one', 'training further first')
    if why := integrity.damage(folder / str(last)):
      with _damage_told(manager, last):
        raise ValueError(why)
    args = _restore({'params': abstract}, partial=True)
    with _damage_told(manager, last):
      return manager.restore(last, args=ocp.args.Composite(state=args))['state']['params']


def _restore(abstract: dict, partial: bool = False) -> ocp.args.PyTreeRestore:
  """Arrays laid out as abstract ones; `partial` if there may be more than these."""
  layout = ocp.checkpoint_utils.construct_restore_args(abstract)
  return ocp.args.PyTreeRestore(abstract, restore_args=layout, partial_restore=partial)


def _damage_told(
  manager: ocp.CheckpointManager, sequences: int
) -> contextlib.AbstractContextManager:
  before = max((s for s in manager.all_steps() if s < sequences), default=None)
  fix = 'moving it away, to go on from ' + (f'sequence {before}' if before else 'scratch')
  return told_as(manager.directory / str(sequences), 'a whole checkpoint', fix, Exception)


def flatten(settings: dict, prefix: str = '') -> dict:
  """Nested settings as one dict with dotted names, its values as JSON gives them back."""
  flat = {}
  for name, value in settings.items():
    if isinstance(value, dict):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = json.loads(json.dumps(value))
  return flat


def policy(name: str) -> str:
  """FREE, NEVER or RECIPE: whether a resume may change the setting of this dotted name."""
  parts = name.split('.')
  prefixes = ('.'.join(parts[:n]) for n in range(len(parts), -1, -1))
  return next(POLICY[prefix] for prefix in prefixes if prefix in POLICY)


def changes(saved: dict, now: dict, accept: bool) -> list[dict]:
  """How flat settings differ from those of a checkpoint, but for knobs of the machine.

  Raises:
    Mistake: with every difference that may not be, or may not be unless `accept`ed.
  """
  mistakes, accepted = [], []
  for name in sorted(saved.keys() | now.keys()):
    before, after = saved.get(name), now.get(name)
    kind = policy(name)
    if before == after or kind == FREE:
      continue
    if kind == RECIPE and accept:
      accepted.append({'setting': name, 'before': before, 'after': after})
      continue
    fix = 'another workdir for another run'
    if kind == RECIPE:
      fix = f'--config.resume.accept_changes, or {fix}'
    got, wanted = ('none' if value in ('', None) else value for value in (after, before))
    mistakes.append(mistake(name, got, f'{wanted}, as in the checkpoint', fix))
  raise_all(mistakes)
  return accepted
