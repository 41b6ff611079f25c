"""Files become documents in the spool once, however often a preparation is started."""

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data import reading, sources, spool
from gptjax.errors import Mistake


@given(st.lists(st.text(max_size=3), max_size=200, unique=True))
def test_files_are_dealt_once_each_to_few_parts(files):
  parts = reading.deal(tuple(files))
  assert sorted(sum(map(list, parts), [])) == sorted(files)
  assert len(parts) <= 64 and max(map(len, parts), default=0) - min(map(len, parts), default=0) <= 1


def test_hashes_are_of_what_the_files_hold(tmp_path):
  for name, data in (('a', b'one'), ('b', b'')):
    (tmp_path / name).write_bytes(data)
  names = (str(tmp_path / 'a'), str(tmp_path / 'b'))
  one, empty = reading.hash_files(names)
  assert one != empty
  shutil.copy(tmp_path / 'a', tmp_path / 'c')
  # Where a file lies does not matter, and how it is read does.
  assert reading.hash_files((str(tmp_path / 'c'),)) == [one]
  shutil.copy(tmp_path / 'a', tmp_path / 'c.jsonl')
  assert reading.hash_files((str(tmp_path / 'c.jsonl'),)) != [one]
  with pytest.raises(Mistake, match='nowhere'):
    reading.hash_files((*names, str(tmp_path / 'nowhere')))


def test_a_part_that_was_read_is_not_read_again_and_half_a_part_is(tmp_path):
  (tmp_path / 'text').mkdir()
  (tmp_path / 'spool').mkdir()
  for i in range(20):
    (tmp_path / 'text' / f'{i}.txt').write_text(f'text {i}' * (i > 0))
  source = sources.find(str(tmp_path / 'text'), 'text', 'train', False)
  part = reading.Part(source, source.files, 7, str(tmp_path / 'spool'), 0, 0.3, 2)

  def found():
    names = spool.names(part.spooled)
    return sorted(text for name in names for text in spool.Bucket(part.spooled, name))

  # What a reader that died left: some documents, and no note that they are all.
  with spool.Writer(part.spooled, 7) as writer:
    writer.add('train-00000', spool.key(b'half', 0), b'half')
  assert reading.read(part) == {'empty': 1}
  assert found() == sorted(f'text {i}'.encode() for i in range(1, 20))
  (tmp_path / 'text' / '3.txt').write_text('another')
  assert reading.read(part) == {'empty': 1}
  assert b'another' not in found()
