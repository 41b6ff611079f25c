"""Checkpoints by Orbax: the state, and what it takes to know whether one may go on from it."""

import contextlib
import json
import logging
from collections.abc import Iterator

import orbax.checkpoint as ocp
from etils import epath

from gptjax import hosts
from gptjax.errors import Mistake, mistake, raise_all, told_as

# What a resume may change, by the longest prefix of a setting's name. FREE are knobs of the
# machine. NEVER would make another model, or another stream of tokens that only looks the same.
# The rest is the recipe, which changes only if asked for.
FREE, NEVER, RECIPE = 'free', 'never', 'recipe'
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
  'resume': FREE,
  'data.sources': FREE,  # folders may move; what is in them is the corpus
  'data.prefetch': FREE,
  'seed': NEVER,
  'model': NEVER,
  'stability.window': NEVER,  # the shape of what the guard knows
  'model.dropout': RECIPE,
  'corpus.tokenizer': NEVER,
  'corpus.context': NEVER,
  'corpus.sources': RECIPE,
}


class Checkpoints:
  """The checkpoints of a run, each named by the sequences consumed.

  A checkpoint is the state (nested dicts of arrays, whatever the mesh) and a record as JSON. One
  that cannot be read is a Mistake: which, why, and what there is besides it.
  """

  def __init__(self, folder: str, keep: int):
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
    )
    self._manager = ocp.CheckpointManager(
      epath.Path(folder).absolute(), options=options, item_names=('state', 'record')
    )

  def latest(self) -> int | None:
    """Sequences consumed at the last complete checkpoint, None if there is none."""
    return self._manager.latest_step()

  def drop_within(self, start: int, stop: int) -> None:
    """Deletes those after `start`, up to `stop`."""
    for sequences in self._manager.all_steps():
      if start < sequences <= stop:
        self._manager.delete(sequences)

  def record(self, sequences: int) -> dict:
    """What was saved beside the state."""
    args = ocp.args.Composite(record=ocp.args.JsonRestore())
    with self.damage_told(sequences):
      return self._manager.restore(sequences, args=args)['record']

  def restore(self, sequences: int, abstract: dict) -> dict:
    """The state, laid out as the abstract state says: any mesh restores from any other."""
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    with self.damage_told(sequences):
      return self._manager.restore(sequences, args=args)['state']

  def damage_told(self, sequences: int) -> contextlib.AbstractContextManager:
    """Turns whatever goes wrong with what a checkpoint holds into a Mistake that names it."""
    return _damage_told(self._manager, sequences)

  def save(self, sequences: int, state: dict, record: dict) -> None:
    """Starts to save and returns when the state was copied from the devices."""
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
    with self._failure_told():
      self._manager.save(sequences, args=args)

  def wait(self) -> int | None:
    """Waits until everything is on disk, and returns what `latest` does."""
    with self._failure_told():
      self._manager.wait_until_finished()
    return self.latest()

  def close(self) -> None:
    """Waits until everything is on disk."""
    self.wait()
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
      with told_as(f'checkpoints in {self._manager.directory}', 'to be written', fix, Exception):
        raise


def load_params(folder: epath.Path, abstract: dict) -> dict:
  """The params alone of the last checkpoint in a folder of checkpoints.

  Raises:
    Mistake: if there is none, or it is damaged.
  """
  options = ocp.CheckpointManagerOptions(create=False)
  with ocp.CheckpointManager(folder.absolute(), options=options, item_names=('state',)) as manager:
    last = manager.latest_step()
    if last is None:
      raise mistake('checkpoints', f'none in {folder}', 'a complete one', 'training further first')
    wanted = {'params': abstract}
    args = ocp.args.PyTreeRestore(
      wanted,
      restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
      partial_restore=True,
    )
    with _damage_told(manager, last):
      return manager.restore(last, args=ocp.args.Composite(state=args))['state']['params']


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
    mistakes.append(mistake(name, after, f'{before}, as in the checkpoint', fix))
  raise_all(mistakes)
  return accepted
