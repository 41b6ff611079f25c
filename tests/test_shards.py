"""Windows are the documents, each token a target once, whoever makes them."""

import dataclasses
import hashlib
import math
import os
import pathlib
import shutil
import string

import hypothesis
import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import strategies as st

from gptjax import prepare
from gptjax.data import dataset, engines, shards, spool
from gptjax.data import tokenizer as tokenizers
from gptjax.errors import Mistake
from tests.texts import RECIPE, make, write


def streams(corpus, split):
  """Each shard's windows joined again: [1 + windows · context] tokens."""
  windows = dataset.open_split(corpus.folder, split)
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


def test_windows_are_the_documents(packed, texts):
  """Joined again, a shard's windows are its documents, each after an end-of-text."""
  tokenizer = tokenizers.load(packed.folder)
  want = {}
  for text in sorted(texts, key=lambda t: spool.key(t.encode(), 3)):
    place = shards.place(spool.key(text.encode(), 3), 0.2, 3)
    want.setdefault(place, [packed.end_of_text])
    want[place] += [*tokenizer.encode(text), packed.end_of_text]
  assert len(want) == 3 + 1
  for split in ('train', 'validation'):
    targets = 0
    for i, stream in enumerate(streams(packed, split)):
      assert stream.tolist() == want[split, i][: len(stream)]
      assert len(want[split, i]) - len(stream) < packed.context  # the tail
      targets += len(stream) - 1
    holds = getattr(packed, split)
    assert targets == holds.windows * packed.context == holds.tokens - holds.tail_tokens > 0


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


def test_counts(packed, texts):
  tokenizer = tokenizers.load(packed.folder)
  both = (packed.train, packed.validation)
  assert sum(s.documents for s in both) == len(texts)
  assert sum(s.bytes for s in both) == sum(len(t.encode()) for t in texts)
  assert sum(s.tokens for s in both) == sum(len(tokenizer.encode(t)) + 1 for t in texts)
  assert packed.tokenizer == tokenizer.identity and packed.vocab_size == tokenizer.vocab_size
  assert packed.end_of_text == tokenizer.end_of_text
  assert (packed.context, packed.seed, packed.duplicates, packed.skipped) == (64, 3, 0, 0)


def test_digest_is_of_the_windows(packed):
  lines = []
  for split in ('train', 'validation'):
    windows = dataset.open_split(packed.folder, split)
    start = 0
    lengths = tfds.builder_from_directory(packed.folder).info.splits[split].shard_lengths
    for i, n in enumerate(lengths):
      rows = [windows[j].astype('<i4').tobytes() for j in range(start, start + n)]
      lines.append(f'{split}-{i:05d} {hashlib.sha256(b"".join(rows)).hexdigest()}\n')
      start += n
  assert packed.digest == hashlib.sha256(''.join(lines).encode()).hexdigest()


def test_unigram_nats(packed, texts):
  """Computed again, one token at a time, from what the validation windows hold."""
  tokenizer = tokenizers.load(packed.folder)
  counts = dict.fromkeys(range(packed.vocab_size), 1)
  for text in texts:
    split, _ = shards.place(spool.key(text.encode(), packed.seed), 0.2, 3)
    if split == 'train':
      for t in [*tokenizer.encode(text), packed.end_of_text]:
        counts[int(t)] += 1
  total = sum(counts.values())
  assert total == packed.train.tokens + packed.vocab_size
  windows = dataset.open_split(packed.folder, 'validation')
  nats = [-math.log(counts[int(t)] / total) for w in windows for t in w[1:]]
  assert packed.unigram_nats == pytest.approx(sum(nats) / len(nats), rel=1e-9)
  assert packed.unigram_nats < math.log(packed.vocab_size)


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


def test_documents_are_shuffled(packed, texts):
  tokenizer = tokenizers.load(packed.folder)
  for stream in streams(packed, 'train'):
    ends = np.flatnonzero(stream == packed.end_of_text)
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


def test_shards_may_be_empty(texts, tmp_path):
  corpus = make(tmp_path, texts[:20], shards=40)
  assert corpus.train.documents + corpus.validation.documents == 20
  windows = dataset.open_split(corpus.folder, 'train')
  assert len([w for w in windows]) == corpus.train.windows


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
    dataset.describe(tmp_path / 'out')
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
