"""What was saved comes back on any mesh; what a resume may change, and what it may not."""

import shutil
import threading

import jax
import numpy as np
import pytest

from gptjax import checkpoint
from gptjax.errors import Mistake
from tests import small


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run') / 'checkpoints'
  program = small.program()
  with small.on(2, 2, 2):
    state = small.init(program)
    checkpoints = checkpoint.Checkpoints(folder, keep=2)
    for sequences in (8, 16, 24):
      checkpoints.save(sequences, state, {'settings': {'seed': sequences}})
    checkpoints.close()
    return folder, program, jax.tree.map(np.asarray, state)


@pytest.mark.parametrize('mesh', [(1, 1, 1), *small.MESHES])
def test_state_is_restored_on_any_mesh(saved, mesh):
  folder, program, state = saved
  with small.on(*mesh):
    abstract = program.abstract_state()
    got = checkpoint.Checkpoints(folder, keep=2).restore(24, abstract)
  jax.tree.map(np.testing.assert_array_equal, got, state)
  layout = lambda a: (a.sharding, a.dtype)
  assert jax.tree.map(layout, got) == jax.tree.map(layout, abstract)


def test_params_are_restored_alone(saved):
  folder, program, state = saved
  with small.on():
    got = checkpoint.load_params(folder, program.abstract_state()['params'])
  jax.tree.map(np.testing.assert_array_equal, got, state['params'])


def test_newest_are_kept_with_their_record(saved):
  folder, *_ = saved
  checkpoints = checkpoint.Checkpoints(folder, keep=2)
  assert checkpoints.latest() == 24
  assert checkpoints.record(24) == {'settings': {'seed': 24}}
  assert checkpoints.record(16) == {'settings': {'seed': 16}}
  assert not (folder / '8').exists()


def test_no_checkpoint_is_none_and_speaks_clearly(tmp_path):
  assert checkpoint.Checkpoints(tmp_path, keep=1).latest() is None
  with pytest.raises(Mistake, match='none in .*, wanted a complete one'):
    checkpoint.load_params(tmp_path, {})


def empty(path):
  shutil.rmtree(path)
  path.mkdir()


def garble(path):
  for file in path.rglob('*'):
    if file.is_file():
      file.write_bytes(b'{]' + file.read_bytes()[3:])


@pytest.mark.parametrize(
  'item, damage',
  [('', empty), ('', garble)]
  + [(item, how) for item in ('state', 'record') for how in (shutil.rmtree, empty, garble)],
)
def test_a_damaged_checkpoint_is_told_with_the_one_before(saved, tmp_path, item, damage):
  folder, program, state = saved
  shutil.copytree(folder, tmp_path / 'c')
  damage(tmp_path / 'c' / '24' / item)
  checkpoints = checkpoint.Checkpoints(tmp_path / 'c', keep=2)
  told = 'c/24: got .*, wanted a whole checkpoint; try moving it away, to go on from sequence 16'
  with small.on():
    abstract = program.abstract_state()
    with pytest.raises(Mistake, match=told):
      checkpoints.record(24)
      checkpoints.restore(24, abstract)
    if item != 'record':
      with pytest.raises(Mistake, match=told):
        checkpoint.load_params(tmp_path / 'c', abstract['params'])
    checkpoints.close()
    shutil.rmtree(tmp_path / 'c' / '24')
    checkpoints = checkpoint.Checkpoints(tmp_path / 'c', keep=2)
    got = checkpoints.restore(checkpoints.latest(), abstract)
  jax.tree.map(np.testing.assert_array_equal, got, state)


def test_saving_goes_on_in_another_thread(saved, tmp_path):
  _, program, state = saved
  commits = []

  def listen(name, *_, **__):
    if 'commit_duration' in name:
      commits.append(threading.current_thread())

  jax.monitoring.register_event_duration_secs_listener(listen)
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
  checkpoints.save(8, state, {})
  checkpoints.close()
  assert commits and threading.main_thread() not in commits


def test_nothing_on_disk_mentions_flax(saved):
  folder, *_ = saved
  for path in (folder / '24').rglob('*'):
    assert not path.is_file() or b'flax' not in path.read_bytes().lower(), path


SETTINGS = {
  'workdir': 'a',
  'seed': 0,
  'train_tokens': 1e6,
  'model.d_model': 64,
  'model.dropout': 0.0,
  'mesh.fsdp': 1,
  'data.sources': 'x',
  'lr.peak': 1e-3,
  'compute.microbatch': 2,
  'corpus.tokenizer': 'abc',
  'corpus.sources': 'def',
}


def test_knobs_of_the_machine_change_freely():
  now = SETTINGS | {'mesh.fsdp': 8, 'compute.microbatch': 1, 'data.sources': 'y', 'workdir': 'b'}
  assert checkpoint.changes(SETTINGS, now, accept=False) == []


def test_recipe_changes_only_if_asked_for_and_is_told():
  now = SETTINGS | {'lr.peak': 2e-3, 'model.dropout': 0.1, 'corpus.sources': 'ghi'}
  with pytest.raises(Mistake) as e:
    checkpoint.changes(SETTINGS, now, accept=False)
  assert '3 mistakes' in str(e.value) and '--config.resume.accept_changes' in str(e.value)
  for name in ('lr.peak: got 0.002, wanted 0.001', 'model.dropout', 'corpus.sources'):
    assert name in str(e.value)
  accepted = checkpoint.changes(SETTINGS, now, accept=True)
  assert {'setting': 'lr.peak', 'before': 1e-3, 'after': 2e-3} in accepted and len(accepted) == 3


NEVER = (
  'seed model.d_model model.pattern model.window model.context corpus.tokenizer corpus.context'
)
RECIPE = 'model.dropout corpus.sources lr.peak batch.sequences adamw.eps train_tokens'
FREE = 'workdir mesh.fsdp compute.dtype data.sources data.prefetch save.keep eval.sequences profile'


@pytest.mark.parametrize('kind, names', [('never', NEVER), ('recipe', RECIPE), ('free', FREE)])
def test_policy_of_what_matters(kind, names):
  assert {checkpoint.policy(name) for name in names.split()} == {kind}


@pytest.mark.parametrize('name', ['seed', 'model.d_model', 'corpus.tokenizer'])
def test_identity_never_changes(name):
  for accept in (False, True):
    with pytest.raises(Mistake, match=f'{name}: got other.*another workdir'):
      checkpoint.changes(SETTINGS, SETTINGS | {name: 'other'}, accept)


def test_every_difference_is_told_at_once():
  with pytest.raises(Mistake, match='2 mistakes'):
    checkpoint.changes(SETTINGS, SETTINGS | {'seed': 1, 'train_tokens': 2e6}, accept=False)


def test_flat_settings_are_as_json_gives_them_back():
  nested = {'a': {'b': (1, 2), 'c': 0.1}, 'd': 'e'}
  assert checkpoint.flatten(nested) == {'a.b': [1, 2], 'a.c': 0.1, 'd': 'e'}
