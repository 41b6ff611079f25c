"""Small corpora of real documents, made in a folder."""

import argparse
import dataclasses
import json
import pathlib

from gptjax import prepare
from gptjax.data import engines

STDLIB = pathlib.Path(argparse.__file__).parent
RECIPE = prepare.Recipe(
  source='given by prepared()',
  text_column='text',
  context=64,
  tokenizer='bytes',
  vocab_size=600,
  seed=3,
  validation_fraction=0.2,
  shards=3,
  on_bad_text='raise',
)


def documents():
  """Of many sizes, all different."""
  files = sorted(STDLIB.glob('*.py'))[:60]
  found = {f.read_text('utf-8')[: 50 + 97 * i] for i, f in enumerate(files)} - {''}
  assert len(found) > 50
  return sorted(found)


def write(folder, texts, name='a.jsonl'):
  folder.mkdir(exist_ok=True)
  (folder / name).write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
  return str(folder)


def prepared(source, out, workers=1, **knobs):
  """A corpus of the text in a folder, made."""
  recipe = dataclasses.replace(RECIPE, source=str(source), **knobs)
  corpus, made = prepare.prepare(recipe, str(out), engines.processes(workers))
  assert made
  return corpus


def make(tmp_path, texts, workers=1, name='out', **knobs):
  """A corpus of these texts, made."""
  return prepared(write(tmp_path / 'source', texts), tmp_path / name, workers, **knobs)
