"""A dataset cannot have code of its own imported."""

import json
import shutil
import sys

import pytest

from gptjax.data import dataset, features
from gptjax.errors import Mistake

EVIL = 'evil.Tensor'


def renamed(node):
  """The features with the class of every leaf replaced."""
  if isinstance(node, dict):
    return {
      k: EVIL if k == 'pythonClassName' and 'Dict' not in v else renamed(v) for k, v in node.items()
    }
  return node


@pytest.mark.parametrize('key', [None, 'python_class_name', 'type'])
def test_a_class_of_its_own_is_refused_and_not_imported(corpus, tmp_path, monkeypatch, key):
  folder = tmp_path / 'corpus'
  shutil.copytree(corpus, folder)
  features.check(folder)
  path = folder / 'features.json'
  text = json.dumps(renamed(json.loads(path.read_text())))
  path.write_text(text.replace('pythonClassName', key) if key else text)
  (tmp_path / 'evil.py').write_text(f'open({str(tmp_path / "ran")!r}, "w")')
  monkeypatch.syspath_prepend(tmp_path)
  for read in (features.check, lambda folder: dataset.open_split(str(folder), 'train')):
    with pytest.raises(
      Mistake, match="features.json: got a class 'evil.Tensor', wanted one of TFDS"
    ):
      read(folder)
  assert not (tmp_path / 'ran').exists() and 'evil' not in sys.modules
