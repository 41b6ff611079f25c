"""A file is whole or as it was."""

import os

import pytest

from gptjax import files


@pytest.mark.parametrize('data', ['text … é', b'\0\xff'])
def test_a_file_holds_what_was_written(tmp_path, data):
  (tmp_path / 'a').write_text('before')
  files.write_whole(tmp_path / 'a', data)
  assert (tmp_path / 'a').read_bytes() == (data.encode() if isinstance(data, str) else data)
  assert [p.name for p in tmp_path.iterdir()] == ['a']


def test_dying_while_writing_leaves_the_file_before(tmp_path, monkeypatch):
  (tmp_path / 'a').write_text('before')

  def half(descriptor):
    os.truncate(descriptor, 3)
    raise KeyboardInterrupt

  monkeypatch.setattr(os, 'fsync', half)
  with pytest.raises(KeyboardInterrupt):
    files.write_whole(tmp_path / 'a', 'after')
  assert (tmp_path / 'a').read_text() == 'before'
