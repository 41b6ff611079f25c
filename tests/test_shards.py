"""Windows are the documents, each token a target once, whoever makes them."""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import pickle
import re
import shutil
import string

import hypothesis
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from hypothesis import strategies as st

from gptjax import prepare
from gptjax.data import engines, shards, spool
from gptjax.data import tokenizer as tokenizers
from gptjax.errors import Mistake

STDLIB = pathlib.Path(argparse.__file__).parent
RECIPE = prepare.Recipe(
  source='given by make()',
  text_column='text',
  context=64,
  tokenizer='bytes',
  vocab_size=600,
  seed=3,
  validation_fraction=0.2,
  shards=3,
  on_bad_text='raise',
)


@pytest.fixture(scope='module')
def texts():
  """Real documents of many sizes, all different."""
  files = sorted(STDLIB.glob('*.py'))[:60]
  found = {f.read_text('utf-8')[: 50 + 97 * i] for i, f in enumerate(files)} - {''}
  assert len(found) > 50
  return sorted(found)


def write(folder, texts, name='a.jsonl'):
  folder.mkdir(exist_ok=True)
  (folder / name).write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
  return str(folder)


def make(tmp_path, texts, workers=1, name='out', **knobs):
  """A corpus, made."""
  source = write(tmp_path / 'source', texts)
  recipe = dataclasses.replace(RECIPE, source=source, **knobs)
  corpus, made = prepare.prepare(recipe, str(tmp_path / name), engines.processes(workers))
  assert made
  return corpus


@pytest.fixture(scope='module', params=['bytes', 'train'])
def corpus(request, texts, tmp_path_factory):
  return make(tmp_path_factory.mktemp('corpus'), texts, tokenizer=request.param)


def streams(corpus, split):
  """Each shard's windows joined again: [1 + windows · context] tokens."""
  windows = shards.open_split(corpus.folder, split)
  lengths = tfds.builder_from_directory(corpus.folder).info.splits[split].shard_lengths
  ends = np.cumsum(lengths)
  assert ends[-1] == len(windows)
  for start, end in zip(ends - lengths, ends, strict=True):
    rows = [windows[i] for i in range(start, end)]
    for a, b in zip(rows, rows[1:], strict=False):
      assert a[-1] == b[0]
    yield np.concatenate([rows[0][:1], *(r[1:] for r in rows)]) if rows else np.zeros(0, int)


def files(folder):
  return {p.name: p.read_bytes() for p in pathlib.Path(folder).iterdir()}


def test_windows_are_the_documents(corpus, texts):
  """Joined again, a shard's windows are its documents, each after an end-of-text."""
  tokenizer = tokenizers.load(corpus.folder)
  want = {}
  for text in sorted(texts, key=lambda t: spool.key(t.encode(), 3)):
    place = shards.place(spool.key(text.encode(), 3), 0.2, 3)
    want.setdefault(place, [corpus.end_of_text])
    want[place] += [*tokenizer.encode(text), corpus.end_of_text]
  assert len(want) == 3 + 1
  for split in ('train', 'validation'):
    targets = 0
    for i, stream in enumerate(streams(corpus, split)):
      assert stream.tolist() == want[split, i][: len(stream)]
      assert len(want[split, i]) - len(stream) < corpus.context  # the tail
      targets += len(stream) - 1
    holds = getattr(corpus, split)
    assert targets == holds.windows * corpus.context == holds.tokens - holds.tail_tokens > 0


@hypothesis.given(
  st.lists(st.integers(0, 40), max_size=12),
  st.integers(1, 9),
)
def test_every_token_is_a_target_once(lengths, context):
  numbers = iter(range(1, 1000))
  documents = [np.array([next(numbers) for _ in range(n)] + [0], np.int32) for n in lengths]
  stream = np.concatenate([[0], *documents])
  rows = [r for rs in shards.pack(iter(documents), 0, context) for r in rs]
  for i, row in enumerate(rows):
    np.testing.assert_array_equal(row, stream[i * context : i * context + context + 1])
  assert len(rows) == (len(stream) - 1) // context


def test_counts(corpus, texts):
  tokenizer = tokenizers.load(corpus.folder)
  both = (corpus.train, corpus.validation)
  assert sum(s.documents for s in both) == len(texts)
  assert sum(s.bytes for s in both) == sum(len(t.encode()) for t in texts)
  assert sum(s.tokens for s in both) == sum(len(tokenizer.encode(t)) + 1 for t in texts)
  assert corpus.tokenizer == tokenizer.identity and corpus.vocab_size == tokenizer.vocab_size
  assert corpus.end_of_text == tokenizer.end_of_text
  assert (corpus.context, corpus.seed, corpus.duplicates, corpus.skipped) == (64, 3, 0, 0)


def test_digest_is_of_the_windows(corpus):
  lines = []
  for split in ('train', 'validation'):
    windows = shards.open_split(corpus.folder, split)
    start = 0
    lengths = tfds.builder_from_directory(corpus.folder).info.splits[split].shard_lengths
    for i, n in enumerate(lengths):
      rows = [windows[j].astype('<i4').tobytes() for j in range(start, start + n)]
      lines.append(f'{split}-{i:05d} {hashlib.sha256(b"".join(rows)).hexdigest()}\n')
      start += n
  assert corpus.digest == hashlib.sha256(''.join(lines).encode()).hexdigest()


def test_unigram_nats(corpus, texts):
  """Computed again, one token at a time, from what the validation windows hold."""
  tokenizer = tokenizers.load(corpus.folder)
  counts = dict.fromkeys(range(corpus.vocab_size), 1)
  for text in texts:
    split, _ = shards.place(spool.key(text.encode(), corpus.seed), 0.2, 3)
    if split == 'train':
      for t in [*tokenizer.encode(text), corpus.end_of_text]:
        counts[int(t)] += 1
  total = sum(counts.values())
  assert total == corpus.train.tokens + corpus.vocab_size
  windows = shards.open_split(corpus.folder, 'validation')
  nats = [-math.log(counts[int(t)] / total) for w in windows for t in w[1:]]
  assert corpus.unigram_nats == pytest.approx(sum(nats) / len(nats), rel=1e-9)
  assert corpus.unigram_nats < math.log(corpus.vocab_size)


def test_same_bytes_whatever_the_workers_and_the_files(texts, tmp_path):
  """Two processes, other files, another order of documents: the same folder, byte for byte."""
  one = make(tmp_path, texts, tokenizer='train')
  shutil.rmtree(tmp_path / 'source')
  mixed = np.random.default_rng(0).permutation(texts)
  for i in range(5):
    write(tmp_path / 'source', mixed[i::5], f'{i}.jsonl')
  recipe = dataclasses.replace(RECIPE, source=str(tmp_path / 'source'), tokenizer='train')
  two, _ = prepare.prepare(recipe, str(tmp_path / 'two'), engines.processes(2))
  assert two == dataclasses.replace(one, folder=two.folder)
  a, b = files(one.folder), files(two.folder)
  assert a.pop('metadata.json') != b.pop('metadata.json')  # of other files, which it tells
  assert a == b and len(a) == 3 + 1 + 4


def test_seed_shuffles_and_splits_anew(texts, tmp_path):
  a, b = (make(tmp_path, texts, name=str(s), seed=s) for s in (1, 2))
  assert a.digest != b.digest
  key = lambda t, seed: spool.key(t.encode(), seed)
  held_out = [{t for t in texts if spool.uniform(key(t, s)) < 0.2} for s in (1, 2)]
  assert held_out[0] != held_out[1]
  assert [len(h) for h in held_out] == [a.validation.documents, b.validation.documents]


def test_documents_are_shuffled(corpus, texts):
  tokenizer = tokenizers.load(corpus.folder)
  for stream in streams(corpus, 'train'):
    ends = np.flatnonzero(stream == corpus.end_of_text)
    pairs = zip(ends, ends[1:], strict=False)
    order = [texts.index(tokenizer.decode(stream[a + 1 : b])) for a, b in pairs]
    assert len(order) > 5 and order != sorted(order)


def test_duplicates_are_left_out_and_held_out_text_is_never_trained_on(texts, tmp_path):
  once = make(tmp_path, texts)
  thrice = make(tmp_path, texts + texts[::-1] + texts[:7], name='thrice')
  assert thrice.duplicates == len(texts) + 7 and once.duplicates == 0
  assert thrice == dataclasses.replace(once, folder=thrice.folder, duplicates=len(texts) + 7)
  text_of = lambda split: {
    bytes(t.astype(np.uint8))
    for s in streams(thrice, split)
    for t in np.split(s, np.flatnonzero(s == 256) + 1)[1:-1]
  }
  train, held_out = text_of('train'), text_of('validation')
  assert train and held_out and not train & held_out


@pytest.mark.parametrize(('vocab_size', 'dtype'), [(65536, np.uint16), (65537, np.int32)])
def test_dtype_holds_the_vocabulary(vocab_size, dtype):
  features = shards._features(4, vocab_size)
  row = np.array([0, 1, vocab_size - 2, vocab_size - 1, 7]).astype(features['tokens'].np_dtype)
  back = features.deserialize_example_np(features.serialize_example({'tokens': row}))['tokens']
  assert back.dtype == dtype and back.tolist() == [0, 1, vocab_size - 2, vocab_size - 1, 7]


def test_is_a_tfds_dataset(corpus):
  builder = tfds.builder_from_directory(corpus.folder)
  assert builder.info.metadata['corpus']['digest'] == corpus.digest
  source = builder.as_data_source('validation[1:3]')
  windows = shards.open_split(corpus.folder, 'validation')
  assert len(source) == 2
  np.testing.assert_array_equal(source[0]['tokens'], windows[1])


def test_windows_are_a_source(corpus):
  import grain

  windows = shards.open_split(corpus.folder, 'train')
  assert len(windows) == corpus.train.windows
  assert windows[0].shape == (corpus.context + 1,) and windows[0].dtype == np.uint16
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
  first = shards.open_split(corpus.folder, 'train')[0]
  moved = shutil.move(corpus.folder, tmp_path / 'moved')
  assert shards.describe(moved) == dataclasses.replace(corpus, folder=str(moved))
  np.testing.assert_array_equal(shards.open_split(moved, 'train')[0], first)


def test_shards_may_be_empty(texts, tmp_path):
  corpus = make(tmp_path, texts[:20], shards=40)
  assert corpus.train.documents + corpus.validation.documents == 20
  windows = shards.open_split(corpus.folder, 'train')
  assert len([w for w in windows]) == corpus.train.windows


def test_damage_is_told(texts, tmp_path):
  corpus = make(tmp_path, texts)
  folder = pathlib.Path(corpus.folder)
  shard = folder / 'corpus-train.array_record-00001-of-00003'
  data = shard.read_bytes()
  shard.write_bytes(data[:-1])
  other = folder / 'corpus-validation.array_record-00000-of-00001'
  other.unlink()
  with pytest.raises(Mistake, match='2 mistakes:(.|\n)*no such file') as e:
    shards.describe(folder)
  assert shard.name in str(e.value) and other.name in str(e.value)
  for name, state in (
    ('metadata.json', 'not a prepared corpus'),
    ('dataset_info.json', 'not a prepared corpus'),
  ):
    text = (folder / name).read_bytes()
    (folder / name).unlink()
    with pytest.raises(Mistake, match=state):
      shards.open_split(folder, 'train')
    (folder / name).write_bytes(text)
  with pytest.raises(Mistake, match='does not exist'):
    shards.describe(tmp_path / 'nowhere')
  with pytest.raises(Mistake, match='split: got test'):
    shards.open_split(folder, 'test')


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
    shards.open_split(folder, 'train')[0]


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
      shards.describe(path.parent)


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
      shards.open_split(folder, 'train')[0]
    (folder / name).write_text(text)


def test_another_tokenizer_than_the_one_of_the_windows_is_told(texts, tmp_path):
  corpus = make(tmp_path, texts, tokenizer='train')
  tokenizers.Bytes().save(corpus.folder)
  with pytest.raises(Mistake, match='which made its windows'):
    shards.describe(corpus.folder)


def test_a_damaged_record_is_told_when_it_is_read(texts, tmp_path):
  corpus = make(tmp_path, texts)
  for shard in pathlib.Path(corpus.folder).glob('corpus-train*'):
    data = bytearray(shard.read_bytes())
    data[len(data) // 2 :: 97] = bytes(len(data[len(data) // 2 :: 97]))
    shard.write_bytes(data)
  windows = shards.open_split(corpus.folder, 'train')
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


def test_a_failure_on_the_way_leaves_nothing_that_looks_whole(texts, tmp_path, monkeypatch):
  """Stopped at the last step, the folder does not exist; run again, it is as if never stopped."""
  whole = make(tmp_path, texts, name='whole')
  stop = lambda *args, **knobs: (_ for _ in ()).throw(KeyboardInterrupt)
  with monkeypatch.context() as m:
    m.setattr(shards, 'finish', stop)
    with pytest.raises(KeyboardInterrupt):
      make(tmp_path, texts)
  assert sorted(os.listdir(tmp_path)) == ['out.incomplete', 'source', 'whole']
  with pytest.raises(Mistake, match='does not exist'):
    shards.describe(tmp_path / 'out')
  assert files(make(tmp_path, texts).folder) == files(whole.folder)


@pytest.mark.parametrize(
  ('knobs', 'message'),
  [
    ({'context': 10**6}, '2 mistakes:(.|\n)*train split: got no window of 1000000 tokens'),
    ({'validation_fraction': 1e-9}, 'validation split: got no window of 64 tokens: 0 tokens in 0'),
  ],
)
def test_an_empty_split_raises(texts, tmp_path, knobs, message):
  with pytest.raises(Mistake, match=message):
    make(tmp_path, texts, **knobs)
  assert os.listdir(tmp_path) == ['source']


def test_held_out_share(tmp_path):
  """Of many documents, the share held out is the one asked for (within 5 standard deviations)."""
  keys = [spool.key(str(i).encode(), 0) for i in range(20_000)]
  places = [shards.place(k, 0.1, 4) for k in keys]
  held_out = sum(s == 'validation' for s, _ in places)
  assert abs(held_out - 2000) < 5 * math.sqrt(20_000 * 0.1 * 0.9)
  for i in range(4):
    assert abs(places.count(('train', i)) - 4500) < 5 * math.sqrt(4500)


@hypothesis.given(
  st.lists(st.tuples(st.sampled_from('ab'), st.text(string.printable)), max_size=30),
  st.integers(1, 4),
)
@hypothesis.settings(deadline=None, max_examples=30)
def test_spool_depends_only_on_what_is_in_it(tmp_path_factory, documents, parts):
  folder = tmp_path_factory.mktemp('spool')
  for part in range(parts):
    with spool.Writer(folder, part) as writer:
      for name, text in documents[part::parts]:
        writer.add(name, spool.key(text.encode(), 0), text.encode())
  for name in 'ab':
    put = [t.encode() for n, t in documents if n == name]
    bucket = spool.Bucket(folder, name)
    assert list(bucket) == sorted(set(put), key=lambda t: spool.key(t, 0))
    assert len(bucket) == len(set(put)) and bucket.duplicates == len(put) - len(set(put))


def test_spool_flushes_as_it_fills(tmp_path, monkeypatch):
  monkeypatch.setattr(spool, '_BUFFERED', 10)
  texts = [f'text {i}'.encode() for i in range(50)]
  with spool.Writer(tmp_path, 0) as writer:
    for text in texts:
      writer.add('a', spool.key(text, 0), text)
      assert writer._held <= 10
  assert sorted(spool.Bucket(tmp_path, 'a')) == sorted(texts)
