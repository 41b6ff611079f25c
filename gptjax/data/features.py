"""Which classes a TFDS dataset names: TFDS imports them, and what is imported runs."""

import json
import os
from collections.abc import Iterator

from etils import epath

from gptjax.errors import mistake

OWN = 'tensorflow_datasets.core.features.'
KEYS = ('pythonClassName', 'python_class_name', 'type')


def check(folder: str | os.PathLike) -> None:
  """Raises a Mistake for a dataset that names a class which is not TFDS's own."""
  path = epath.Path(folder) / 'features.json'
  for name in _named(json.loads(path.read_text())):
    if not name.startswith(OWN):
      raise mistake(path, f'a class {name!r}', "one of TFDS's own", 'another dataset')


def _named(node) -> Iterator[str]:
  if isinstance(node, list):
    for each in node:
      yield from _named(each)
  elif isinstance(node, dict):
    for key, value in node.items():
      if key in KEYS and isinstance(value, str):
        yield value
      else:
        yield from _named(value)
