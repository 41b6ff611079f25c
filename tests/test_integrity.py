"""A folder whose list says it is whole is whole, whatever was done to it."""

import os
import random

import pytest
from etils import epath

from gptjax import integrity


def written(folder, processes=1):
  random.seed(0)
  names = ['_METADATA', 'record/metadata', 'state/manifest', 'state/empty']
  names += [f'state/ocdbt.process_{i}/d/{n}' for i in range(processes) for n in 'ab']
  names += [f'state/array_metadatas/process_{i}' for i in range(processes)]
  for name in names:
    path = epath.Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'' if name.endswith('empty') else random.randbytes(random.randrange(1, 999)))
  for i in range(processes):
    integrity.write_list(epath.Path(folder), i, processes)
  return epath.Path(folder)


@pytest.mark.parametrize('processes, readers', [(1, 1), (3, 1), (3, 4), (1, 3)])
def test_what_was_written_is_whole(tmp_path, processes, readers):
  folder = written(tmp_path, processes)
  assert [integrity.damage(folder, i, readers) for i in range(readers)] == [''] * readers


@pytest.mark.parametrize('readers', [1, 3])
def test_every_bit_and_every_file_counts(tmp_path, readers):
  folder = written(tmp_path, 2)
  told = lambda: ' '.join(integrity.damage(folder, i, readers) for i in range(readers)).strip()
  paths = sorted(p for p in tmp_path.rglob('*') if not p.is_dir() and 'sums' not in p.name)
  assert len(paths) == 10
  for path in paths:
    name, whole = str(path.relative_to(folder)), path.read_bytes()
    for place in {0, len(whole) // 2, len(whole) - 1} if whole else ():
      flipped = bytearray(whole)
      flipped[place] ^= 1 << random.randrange(8)
      path.write_bytes(bytes(flipped))
      assert told() == f'{name} is not what was written'
    for other in (whole[:-1], whole + b'\0'):
      path.write_bytes(other)
      assert bool(told()) == (other != whole)
    path.unlink()
    assert f'{name} is missing' in told()
    path.write_bytes(whole)
  (folder / 'state' / 'more').write_bytes(b'')
  assert 'state/more was not written with it' in told()


def test_a_list_is_written_last_and_by_all(tmp_path):
  folder = written(tmp_path / 'a', 3)
  (folder / 'sums.1-of-3.json').unlink()
  assert integrity.damage(folder) == '1 of 3 lists of its files are missing: it was not finished'
  (folder / 'sums.0-of-3.json').write_text('{"count": 3}')
  assert 'cannot be read: KeyError' in integrity.damage(folder)
  for path in folder.glob('sums*'):
    path.unlink()
  assert 'was not finished' in integrity.damage(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason='root reads everything')
def test_what_cannot_be_read_is_damage(tmp_path):
  folder = written(tmp_path)
  (tmp_path / '_METADATA').chmod(0)
  assert '_METADATA cannot be read' in integrity.damage(folder)
