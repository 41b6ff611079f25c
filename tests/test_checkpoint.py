"""What was saved comes back on any mesh; what a resume may change, and what it may not."""

import dataclasses
import shutil
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gptjax import checkpoint, integrity
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


def test_the_state_is_on_disk_as_it_is_in_memory(saved):
  folder, _, state = saved
  size = sum(path.stat().st_size for path in (folder / '24' / 'state').rglob('*'))
  # All moments of a new state are 0, of which a compressed one would need next to nothing.
  assert size > sum(x.nbytes for x in jax.tree.leaves(state))


def test_a_state_that_was_compressed_is_restored(saved, tmp_path):
  _, program, state = saved
  with ocp.CheckpointManager(tmp_path / 'c') as manager:
    manager.save(8, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
  with small.on(), checkpoint.Checkpoints(tmp_path / 'c', keep=1) as checkpoints:
    got = checkpoints.restore(8, program.abstract_state())
  jax.tree.map(np.testing.assert_array_equal, got, state)


def test_a_state_of_another_shape_is_refused(saved):
  folder, program, _ = saved
  wider = small.program(dataclasses.replace(small.SHAPE, d_ff=2 * small.SHAPE.d_ff))
  with small.on(), checkpoint.Checkpoints(folder, keep=2) as checkpoints:
    with pytest.raises(Mistake, match='a whole checkpoint'):
      checkpoints.restore(24, wider.abstract_state())


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


def flip(path):
  """One bit of the largest file, as a disk or a network may."""
  file = max((p for p in path.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def cut(path):
  file = max((p for p in path.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
  file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
  'item, damage',
  [('', empty), ('', garble)]
  + [(item, how) for item in ('state', 'record') for how in (shutil.rmtree, empty, flip, cut)],
)
def test_a_damaged_checkpoint_goes_aside_and_the_one_before_is_used(
  saved, tmp_path, capsys, item, damage
):
  folder, program, state = saved
  shutil.copytree(folder, tmp_path / 'c')
  damage(tmp_path / 'c' / '24' / item)
  if damage is not empty or item:
    with small.on(), pytest.raises(Mistake, match='c/24: got .*to go on from sequence 16'):
      checkpoint.load_params(tmp_path / 'c', program.abstract_state()['params'])
  there = sorted(p.relative_to(tmp_path / 'c') for p in (tmp_path / 'c').rglob('*'))
  checkpoints = checkpoint.Checkpoints(tmp_path / 'c', keep=2)
  assert checkpoints.newest_whole() == 16
  kind, name = 'DAMAGED ', '24.0'
  if damage is empty and not item:
    kind, name = 'aside   ', '24.unfinished'
  assert f'{kind} checkpoint 24: ' in capsys.readouterr().out
  assert (tmp_path / 'damaged' / name).exists() and not (tmp_path / 'c' / '24').exists()
  with small.on():
    got = checkpoints.restore(16, program.abstract_state())
    jax.tree.map(np.testing.assert_array_equal, got, state)
    checkpoints.save(24, got, {'settings': 'again'})
    checkpoints.close()
  assert checkpoint.Checkpoints(tmp_path / 'c', keep=2).newest_whole() == 24
  assert len(there) > 20


def test_an_unfinished_checkpoint_is_none(saved, tmp_path):
  """It was killed after Orbax was done, and before its files were listed."""
  folder, *_ = saved
  shutil.copytree(folder, tmp_path / 'c')
  for at in ('24', '16'):
    (tmp_path / 'c' / at / 'sums.0-of-1.json').unlink()
    checkpoints = checkpoint.Checkpoints(tmp_path / 'c', keep=2)
    assert checkpoints.latest() == (16 if at == '24' else None)
  assert checkpoints.newest_whole() is None
  aside = tmp_path / 'damaged'
  there = lambda: sorted(p.name for p in aside.iterdir() if p.is_dir())
  assert there() == ['16.unfinished', '24.unfinished']
  assert 'was not finished' in (aside / '24.unfinished.txt').read_text()
  shutil.copytree(aside / '24.unfinished', tmp_path / 'c' / '32')
  assert checkpoint.Checkpoints(tmp_path / 'c', keep=2).newest_whole() is None
  assert there() == ['32.unfinished']  # those of the last start alone


def test_no_whole_checkpoint_is_told_and_all_stay(saved, tmp_path):
  folder, *_ = saved
  shutil.copytree(folder, tmp_path / 'c')
  flip(tmp_path / 'c' / '24')
  flip(tmp_path / 'c' / '16')
  with pytest.raises(Mistake, match='got 24: .* is not what was written, 16: .*wanted one that is'):
    checkpoint.Checkpoints(tmp_path / 'c', keep=2).newest_whole()
  assert {'24', '16'} <= {p.name for p in (tmp_path / 'c').iterdir()}


def test_marks_are_kept_besides_the_newest(saved, tmp_path):
  _, program, state = saved
  checkpoints = checkpoint.Checkpoints(tmp_path / 'c', keep=2, keep_every=100)
  left = []
  for sequences in (30, 60, 90, 120, 150, 190, 230, 260):
    checkpoints.save(sequences, {'a': np.ones(3)}, {})
    checkpoints.wait()
    left.append(sorted(int(p.name) for p in (tmp_path / 'c').iterdir()))
  assert left[:4] == [[30], [30, 60], [60, 90], [90, 120]]
  assert left[4:] == [[120, 150], [120, 150, 190], [120, 190, 230], [120, 230, 260]]


def test_a_save_that_fails_is_told_and_the_next_one_goes_well(saved, tmp_path, monkeypatch):
  """The newest that is whole stays, however few are kept."""
  _, program, state = saved
  checkpoints = checkpoint.Checkpoints(tmp_path / 'c', keep=1)
  checkpoints.save(8, state, {})
  assert checkpoints.wait() == 8 and checkpoints.poll() == (False, None)
  real = integrity.write_list

  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(integrity, 'write_list', full)
  checkpoints.save(16, state, {})
  with pytest.raises(Mistake, match='No space left'):
    checkpoints.wait()
  assert checkpoints.poll() == (False, None)  # it was told
  monkeypatch.setattr(integrity, 'write_list', real)
  assert checkpoints.latest() == 8
  checkpoints.save(24, state, {})
  assert checkpoints.wait() == 24
  assert {p.name for p in (tmp_path / 'c').iterdir()} == {'24'}
  checkpoints.close()


def test_a_save_that_fails_hides_nothing_greater(saved, tmp_path, monkeypatch, capsys):
  _, program, state = saved
  told = 'No space left'
  monkeypatch.setattr(integrity, 'write_list', lambda *_: (_ for _ in ()).throw(OSError(28, told)))
  with pytest.raises(KeyError), checkpoint.Checkpoints(tmp_path / 'c', keep=1) as checkpoints:
    checkpoints.save(8, state, {})
    raise KeyError
  assert 'FAILED   checkpoints in' in capsys.readouterr().err
  with pytest.raises(Mistake, match=told), checkpoint.Checkpoints(tmp_path / 'd', 1) as checkpoints:
    checkpoints.save(8, state, {})


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
