"""Documents come out of files exactly as they lie there, and nothing is left out in silence."""

import collections
import gzip
import json
import os
import pathlib
import sys
import sysconfig
import tracemalloc

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
import zstandard
from array_record.python import array_record_module
from etils import epath
from fsspec.implementations import dirfs, local
from hypothesis import strategies as st

from gptjax.data import sources
from gptjax.errors import Mistake

TEXTS = ['one\r\ntwo\n', ' \u2581\ufeff é漢😀 \0', '{"text": "not a row"}', 'x' * 300_000]


def pack(path: pathlib.Path, data: bytes) -> None:
  if path.suffix == '.gz':
    data = gzip.compress(data)
  elif path.suffix == '.zst':
    data = zstandard.compress(data)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data)


def json_lines(texts, column='text', **knobs):
  return ''.join(json.dumps({'id': i, column: t}, **knobs) + '\n' for i, t in enumerate(texts))


def read_all(source, text_column='text', skip=False, tokenizer='train'):
  """All documents and the counts of what was skipped."""
  found = sources.find(str(source), text_column, str(tokenizer), skip)
  skipped = collections.Counter(dict(found.left_out))
  return [d for f in found.files for d in sources.read(found, f, skipped)], dict(skipped)


@pytest.mark.parametrize('packing', ['', '.gz', '.zst'])
def test_text_files_are_one_document_each(tmp_path, packing):
  for i, text in enumerate(TEXTS):
    pack(tmp_path / f'{"deep/" * i}{i}.txt{packing}', text.encode())
  documents, skipped = read_all(tmp_path)
  assert sorted(d.text for d in documents) == sorted(TEXTS) and not skipped
  assert {pathlib.Path(d.name).name for d in documents} == {f'{i}.txt{packing}' for i in range(4)}


@pytest.mark.parametrize('packing', ['', '.gz', '.zst'])
@pytest.mark.parametrize('ascii_only', [True, False])
def test_json_lines(tmp_path, packing, ascii_only):
  path = tmp_path / f'a.jsonl{packing}'
  pack(path, ('\n' + json_lines(TEXTS, 'body', ensure_ascii=ascii_only)).encode())
  documents, skipped = read_all(path, 'body')
  assert [d.text for d in documents] == TEXTS and not skipped
  assert [d.name for d in documents] == [f'{path}:{i}' for i in (2, 3, 4, 5)]


@pytest.mark.parametrize(
  'kind', [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet(tmp_path, kind):
  path = tmp_path / 'a.parquet'
  texts = TEXTS + [f'row {i}' for i in range(200)]
  column = pa.array(texts).cast(kind)
  pq.write_table(pa.table({'n': list(range(len(texts))), 'body': column}), path, row_group_size=50)
  documents, skipped = read_all(path, 'body')
  assert [d.text for d in documents] == texts and not skipped
  assert documents[-1].name == f'{path}:{len(texts)}'


@hypothesis.given(st.lists(st.binary(max_size=300_000), max_size=4))
@hypothesis.settings(deadline=None, max_examples=30)
def test_zstandard_frames_one_after_another(tmp_path_factory, parts):
  path = tmp_path_factory.mktemp('z') / 'a.txt.zst'
  data = b''.join(zstandard.compress(p) for p in parts)
  path.write_bytes(data)
  with sources._opened(str(path)) as f:
    assert f.read() == b''.join(parts)


def test_glob_reads_any_text_file_and_folder_only_known_ones(tmp_path):
  pack(tmp_path / 'a.txt', b'a')
  pack(tmp_path / 'b.py', b'b')
  pack(tmp_path / 'c/d.py', b'd')
  documents, skipped = read_all(tmp_path)
  assert [d.text for d in documents] == ['a'] and skipped == {'another kind of file': 2}
  assert [d.text for d in read_all(tmp_path / '*.py')[0]] == ['b']
  assert [d.text for d in read_all(tmp_path / '**/*.py')[0]] == ['b', 'd']
  assert [d.text for d in read_all(tmp_path / 'b.py')[0]] == ['b']


def test_standard_library():
  documents, skipped = read_all('stdlib')
  names = [d.name for d in documents]
  root = sysconfig.get_paths()['stdlib']
  text = {d.name: d.text for d in documents}
  assert text[f'{root}/argparse.py'] == pathlib.Path(f'{root}/argparse.py').read_bytes().decode()
  assert names == sorted(names) and len(names) > 300
  assert not any('site-packages' in n or '/test/' in n for n in names)
  assert sum(len(t) for t in text.values()) > 5_000_000


def test_standard_library_counts_what_is_not_utf8(tmp_path, monkeypatch):
  paths = sysconfig.get_paths() | {'stdlib': str(tmp_path)}
  monkeypatch.setattr(sysconfig, 'get_paths', lambda: paths)
  for name, data in {
    'good.py': b'pass',
    'latin.py': b'# \xe9',
    'test/test_good.py': b'pass',
    'site-packages/numpy.py': b'pass',
    'pkg/__init__.py': b'',
  }.items():
    pack(tmp_path / name, data)
  documents, skipped = read_all('stdlib')
  assert [d.text for d in documents] == ['pass']
  assert skipped == {'not UTF-8': 1, 'empty': 1, "the library's own tests": 1}


BAD_LINES = {
  'not UTF-8': b'{"text": "\xff"}',
  'bad JSON': b'{"text": "cut o',
  'not a JSON object': b'["text"]',
  'no text column': b'{"txt": "a"}',
  'not a text': b'{"text": null}',
}


@pytest.mark.parametrize('reason', BAD_LINES)
def test_bad_line_raises_with_its_number_or_is_counted(tmp_path, reason):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'{"text": "before"}\n' + BAD_LINES[reason] + b'\n{"text": "after"}\n')
  with pytest.raises(Mistake, match=rf'a\.jsonl:2: got {reason}'):
    read_all(path)
  documents, skipped = read_all(path, skip=True)
  assert [d.text for d in documents] == ['before', 'after'] and skipped == {reason: 1}


def test_half_a_surrogate_pair_is_not_text(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "\\ud83d"}\n{"text": "\\ud83d\\ude00"}\n')
  with pytest.raises(Mistake, match=r'a\.jsonl:1: got not UTF-8'):
    read_all(tmp_path)
  documents, skipped = read_all(tmp_path, skip=True)
  assert [d.text for d in documents] == ['😀'] and skipped == {'not UTF-8': 1}


def test_bad_text_file(tmp_path):
  (tmp_path / 'bad.txt').write_bytes(b'caf\xe9')
  (tmp_path / 'good.txt').write_text('good')
  with pytest.raises(Mistake, match=r'bad\.txt: got not UTF-8'):
    read_all(tmp_path)
  documents, skipped = read_all(tmp_path, skip=True)
  assert [d.text for d in documents] == ['good'] and skipped == {'not UTF-8': 1}


def test_bad_parquet_rows(tmp_path):
  raw = pa.array([b'good', b'\xff', None, b''], pa.binary())
  column = pa.StringArray.from_buffers(4, *raw.buffers()[1:], raw.buffers()[0])
  pq.write_table(pa.table({'text': column}), tmp_path / 'a.parquet')
  with pytest.raises(Mistake, match=r'a\.parquet:2: got not UTF-8'):
    read_all(tmp_path)
  documents, skipped = read_all(tmp_path, skip=True)
  assert [d.text for d in documents] == ['good']
  assert skipped == {'not UTF-8': 1, 'not a text': 1, 'empty': 1}


def test_missing_parquet_column_names_the_nearest(tmp_path):
  pq.write_table(pa.table({'texts': ['a']}), tmp_path / 'a.parquet')
  with pytest.raises(Mistake, match=r"a\.parquet.*nearest 'texts'"):
    read_all(tmp_path, skip=True)


@pytest.mark.parametrize('name', ['a.jsonl.gz', 'a.jsonl.zst', 'a.txt.zst', 'a.parquet'])
@pytest.mark.parametrize('damage', ['cut', 'garbled'])
def test_damaged_file_raises_even_if_bad_text_is_skipped(tmp_path, name, damage):
  path = tmp_path / name
  if name == 'a.parquet':
    pq.write_table(pa.table({'text': TEXTS}), path)
  else:
    pack(path, json_lines(TEXTS).encode())
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2] if damage == 'cut' else b'garbage' + data)
  with pytest.raises(Mistake, match=f'{name}: got .*, wanted a readable file'):
    read_all(path, skip=True)


def test_several_places_are_read_once_each(tmp_path):
  (tmp_path / 'a.txt').write_text('one')
  (tmp_path / 'more').mkdir()
  (tmp_path / 'more' / 'b.jsonl').write_text(json_lines(['two', 'three']))
  documents, _ = read_all(f'{tmp_path}/*.txt, {tmp_path}/more,{tmp_path}/a.txt')
  assert sorted(d.text for d in documents) == ['one', 'three', 'two']
  with pytest.raises(Mistake, match='2 mistakes'):
    read_all(f'nowhere,{tmp_path}/*.md,{tmp_path}')


def test_a_tfds_dataset_is_its_examples(tmp_path):
  make_dataset(tmp_path, TEXTS)
  documents, _ = read_all(tmp_path, skip=True)
  assert sorted(d.text for d in documents) == sorted(t for t in TEXTS if t)
  with pytest.raises(Mistake, match="no text column .*'txt' is not among"):
    read_all(tmp_path, text_column='txt')
  (tmp_path / 'features.json').write_text('{')
  with pytest.raises(Mistake, match='wanted a TFDS dataset in array_record'):
    read_all(tmp_path)


def make_dataset(folder, texts):
  """A dataset as TFDS writes it, of one split in two shards."""
  features = tfds.features.FeaturesDict({'text': tfds.features.Text(), 'id': np.int64})
  lengths = []
  for shard in range(2):
    name = f'made-train.array_record-{shard:05d}-of-00002'
    writer = array_record_module.ArrayRecordWriter(str(folder / name), 'group_size:1')
    for i, text in enumerate(texts[shard::2]):
      writer.write(features.serialize_example({'text': text, 'id': i}))
    writer.close()
    lengths.append(len(texts[shard::2]))
  template = tfds.core.ShardedFileTemplate(
    data_dir=folder, dataset_name='made', filetype_suffix='array_record'
  )
  info = tfds.core.SplitInfo(
    name='train', shard_lengths=lengths, num_bytes=0, filename_template=template
  )
  tfds.folder_dataset.write_metadata(
    data_dir=folder, features=features, split_infos=[info], check_data=False
  )


def test_a_damaged_example_is_told(tmp_path):
  make_dataset(tmp_path, TEXTS)
  shard = tmp_path / 'made-train.array_record-00000-of-00002'
  writer = array_record_module.ArrayRecordWriter(str(shard), 'group_size:1')
  writer.write(b'\xff no example')
  writer.close()
  with pytest.raises(Mistake, match='wanted a TFDS dataset in array_record'):
    read_all(tmp_path)


def test_names_of_others_are_read_as_what_they_are(tmp_path):
  lines = '\ufeff' + json_lines(['one', 'two'])
  for name in ('a.json.gz', 'b.NDJSON', 'c.jsonl'):
    pack(tmp_path / name, lines.encode())
  documents, _ = read_all(tmp_path / '*')
  assert [d.text for d in documents] == ['one', 'two'] * 3
  documents, skipped = read_all(tmp_path)
  assert len(documents) == 4 and skipped == {'another kind of file': 1}
  # Others leave a dataset_info.json beside their Parquet.
  pq.write_table(pa.table({'text': ['one']}), tmp_path / 'd.parquet')
  (tmp_path / 'dataset_info.json').write_text('{}')
  assert len(read_all(tmp_path)[0]) == 5


def test_every_folder_is_read_once(tmp_path):
  folder = tmp_path / 'old~'
  folder.mkdir()
  (folder / 'a.txt').write_text('text')
  (folder / 'self').symlink_to(folder)
  (tmp_path / 'above').symlink_to(tmp_path)
  (tmp_path / 'dangling').symlink_to(tmp_path / 'nowhere')
  os.mkfifo(tmp_path / 'b.txt')
  documents, skipped = read_all(tmp_path)
  assert [d.text for d in documents] == ['text'] and skipped == {'not a file': 1}
  with pytest.raises(Mistake, match='which is no file'):
    read_all(tmp_path / 'b.txt')


def test_zstandard_with_a_long_window_and_much_in_little(tmp_path):
  """Little memory for what unpacks to very much, and any window the format has."""
  text = json_lines(['x' * 1_000_000] * 400)
  params = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
  packed = zstandard.ZstdCompressor(compression_params=params).compress(text.encode())
  assert len(packed) < len(text) / 1000
  (tmp_path / 'a.jsonl.zst').write_bytes(packed)
  tracemalloc.start()
  found = sources.find(str(tmp_path), 'text', 'train', False)
  count = sum(1 for _ in sources.read(found, found.files[0], collections.Counter()))
  _, most = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert count == 400 and most < len(text) / 4


def test_a_folder_without_permission_is_told(tmp_path, monkeypatch):
  def listdir(folder):
    raise PermissionError(f'no way into {folder}')

  monkeypatch.setattr(os, 'listdir', listdir)  # root may read everything
  with pytest.raises(Mistake, match='got PermissionError'):
    read_all(tmp_path)


def test_a_scheme_that_nobody_knows_is_told():
  for place in ('https://a.example/b.txt', 'foo://b'):
    with pytest.raises(Mistake, match=f'{place}: got .*Error'):
      read_all(place)


def test_nothing_to_read(tmp_path):
  with pytest.raises(Mistake, match='does not exist'):
    read_all(tmp_path / 'nowhere')
  with pytest.raises(Mistake, match='without a file to read'):
    read_all(tmp_path)
  with pytest.raises(Mistake, match='without a file to read'):
    read_all(tmp_path / '*.txt')
  (tmp_path / 'a.pdf').write_bytes(b'')
  with pytest.raises(Mistake, match=r'without a file to read \(1 another kind of file\)'):
    read_all(tmp_path)


def test_a_bucket_without_its_library_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  epath.backend.fsspec_backend._get_filesystem.cache_clear()
  for place in ('gs://bucket/folder', 'gs://bucket/*.txt'):
    with pytest.raises(Mistake, match='gs://bucket/.*: got ImportError: .*gcsfs'):
      read_all(place)


class Bucket(dirfs.DirFileSystem):
  """A folder as gcsfs shows a bucket: names go in with gs:// before them, and come without."""

  def _join(self, path):
    strip = lambda p: p.removeprefix('gs://')
    return super()._join([*map(strip, path)] if isinstance(path, list) else strip(path))


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """What epath finds at gs://."""
  files = Bucket(path=str(tmp_path), fs=local.LocalFileSystem())
  monkeypatch.setattr(epath.backend.fsspec_backend, '_get_filesystem', lambda name: files)
  return tmp_path


def test_a_bucket_is_read_as_a_folder_is(bucket):
  pack(bucket / 'b' / 'one' / 'a.txt', b'one')
  pack(bucket / 'b' / 'two' / 'deep' / 'a.jsonl.gz', json_lines(['two', 'three']).encode())
  pq.write_table(pa.table({'text': ['four']}), bucket / 'b' / 'two' / 'c.parquet')
  (bucket / 'b' / 'two' / 'picture.png').write_bytes(b'')
  documents, skipped = read_all('gs://b/one/a.txt,gs://b/two')
  assert sorted(d.text for d in documents) == ['four', 'one', 'three', 'two']
  assert skipped == {'another kind of file': 1}
  for pattern, count in (('gs://b/*/a.txt', 1), ('gs://b/two/*.parquet', 1), ('gs://b/two/*', 1)):
    found = sources.find(pattern, 'text', 'train', True)
    assert len([f for f in found.files if not f.endswith('.png')]) == count
    assert all(f.startswith('gs://b/') for f in found.files)
  assert len(sources.hash_file('gs://b/one/a.txt')) == 64
  with pytest.raises(Mistake, match=r'gs://b/\*\*: got .*pattern not supported'):
    read_all('gs://b/**')


def test_missing_package_says_what_to_install(tmp_path, monkeypatch):
  (tmp_path / 'a.parquet').write_bytes(b'')
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(Mistake, match='no pyarrow.*pip install'):
    read_all(tmp_path)
