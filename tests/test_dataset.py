"""A prepared corpus is a TFDS dataset, and what is wrong with one is told."""

import dataclasses
import json
import pathlib
import pickle
import re
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from gptjax.data import dataset
from gptjax.data import tokenizer as tokenizers
from gptjax.errors import Mistake
from tests.texts import make


@pytest.mark.parametrize(('vocab_size', 'dtype'), [(65536, np.uint16), (65537, np.int32)])
def test_dtype_holds_the_vocabulary(vocab_size, dtype):
  features = dataset.features(4, vocab_size)
  row = np.array([0, 1, vocab_size - 2, vocab_size - 1, 7]).astype(features['tokens'].np_dtype)
  back = features.deserialize_example_np(features.serialize_example({'tokens': row}))['tokens']
  assert back.dtype == dtype and back.tolist() == [0, 1, vocab_size - 2, vocab_size - 1, 7]


def test_is_a_tfds_dataset(packed):
  builder = tfds.builder_from_directory(packed.folder)
  assert builder.info.metadata['corpus']['digest'] == packed.digest
  source = builder.as_data_source('validation[1:3]')
  windows = dataset.open_split(packed.folder, 'validation')
  assert len(source) == 2
  np.testing.assert_array_equal(source[0]['tokens'], windows[1])


def test_windows_are_a_source(packed):
  import grain

  windows = dataset.open_split(packed.folder, 'train')
  assert len(windows) == packed.train.windows
  assert windows[0].shape == (packed.context + 1,) and windows[0].dtype == np.uint16
  with pytest.raises(IndexError):
    windows[len(windows)]
  with pytest.raises(IndexError):
    windows[-1]
  again = pickle.loads(pickle.dumps(windows))
  np.testing.assert_array_equal(again[5], windows[5])
  shuffled = grain.MapDataset.source(windows).seed(0).shuffle()
  key = lambda rows: sorted(r.tobytes() for r in rows)
  assert key(shuffled[i] for i in range(len(windows))) == key(windows)


def test_a_corpus_may_be_moved(texts, tmp_path):
  corpus = make(tmp_path, texts)
  first = dataset.open_split(corpus.folder, 'train')[0]
  moved = shutil.move(corpus.folder, tmp_path / 'moved')
  assert dataset.describe(moved) == dataclasses.replace(corpus, folder=str(moved))
  np.testing.assert_array_equal(dataset.open_split(moved, 'train')[0], first)


def test_damage_is_told(texts, tmp_path):
  corpus = make(tmp_path, texts)
  folder = pathlib.Path(corpus.folder)
  shard = folder / 'corpus-train.array_record-00001-of-00003'
  data = shard.read_bytes()
  shard.write_bytes(data[:-1])
  other = folder / 'corpus-validation.array_record-00000-of-00001'
  other.unlink()
  with pytest.raises(Mistake, match='2 mistakes:(.|\n)*no such file') as e:
    dataset.describe(folder)
  assert shard.name in str(e.value) and other.name in str(e.value)
  for name, state in (
    ('metadata.json', 'not a prepared corpus'),
    ('dataset_info.json', 'not a prepared corpus'),
  ):
    text = (folder / name).read_bytes()
    (folder / name).unlink()
    with pytest.raises(Mistake, match=state):
      dataset.open_split(folder, 'train')
    (folder / name).write_bytes(text)
  with pytest.raises(Mistake, match='does not exist'):
    dataset.describe(tmp_path / 'nowhere')
  with pytest.raises(Mistake, match='split: got test'):
    dataset.open_split(folder, 'test')


@pytest.mark.parametrize(
  'name', ['metadata.json', 'dataset_info.json', 'features.json', 'tokenizer.json']
)
@pytest.mark.parametrize('text', [None, '', '[]', '{}', '{"a":', '{"files": 3}', '\xff'])
def test_damaged_metadata_is_told(texts, tmp_path, name, text):
  folder = pathlib.Path(make(tmp_path, texts[:20]).folder)
  if text is None:
    (folder / name).unlink()
  else:
    (folder / name).write_bytes(text.encode('latin-1'))
  with pytest.raises(Mistake, match='; try '):
    dataset.open_split(folder, 'train')[0]


def test_metadata_of_another_shape_is_told(texts, tmp_path):
  path = pathlib.Path(make(tmp_path, texts[:20]).folder) / 'metadata.json'
  whole = json.loads(path.read_text())
  empty = whole['corpus']['validation'] | {'bytes': 0}
  for key, value in (
    ('files', []),
    ('files', {}),
    ('format', 2),
    ('corpus', None),
    ('corpus', {'train': {}}),
    ('corpus', whole['corpus'] | {'tokenizer': 5}),
    ('corpus', whole['corpus'] | {'validation': empty}),
  ):
    path.write_text(json.dumps(whole | {key: value}))
    with pytest.raises(Mistake, match='wanted what gptjax.prepare wrote'):
      dataset.describe(path.parent)


def test_metadata_of_tfds_that_tells_otherwise_is_refused(texts, tmp_path):
  folder = pathlib.Path(make(tmp_path, texts).folder)
  for name, old, new in (
    ('dataset_info.json', r'"shardLengths": \[\s*"\d', '"shardLengths": ["9'),
    ('features.json', '"uint16"', '"int32"'),
  ):
    text = (folder / name).read_text()
    changed = re.sub(old, new, text, count=1)
    assert changed != text
    (folder / name).write_text(changed)
    with pytest.raises(Mistake, match='as were made|wanted a readable one'):
      dataset.open_split(folder, 'train')[0]
    (folder / name).write_text(text)


def test_another_tokenizer_than_the_one_of_the_windows_is_told(texts, tmp_path):
  corpus = make(tmp_path, texts, tokenizer='train')
  tokenizers.Bytes().save(corpus.folder)
  with pytest.raises(Mistake, match='which made its windows'):
    dataset.describe(corpus.folder)


def test_a_damaged_record_is_told_when_it_is_read(texts, tmp_path):
  corpus = make(tmp_path, texts)
  for shard in pathlib.Path(corpus.folder).glob('corpus-train*'):
    data = bytearray(shard.read_bytes())
    data[len(data) // 2 :: 97] = bytes(len(data[len(data) // 2 :: 97]))
    shard.write_bytes(data)
  windows = dataset.open_split(corpus.folder, 'train')
  damaged = []
  for i in range(0, len(windows), 9):
    try:
      windows[i]
    except Mistake as e:
      damaged.append(str(e))
  assert len(damaged) > 3 and 'wanted a readable one' in damaged[0]
  for told in (damaged[0], damaged[-1]):
    # What it names is what cannot be read.
    name, record = re.match(r'(.*), record (\d+): got', told).groups()
    reader = array_record_module.ArrayRecordReader(name)
    with pytest.raises(RuntimeError):
      reader.read([int(record)])
