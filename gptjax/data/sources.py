"""Documents from text, JSON lines, Parquet, TFDS, token files, or the library of this Python."""

import collections
import contextlib
import dataclasses
import difflib
import glob
import gzip
import hashlib
import io
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
import tensorflow_datasets as tfds
import zstandard
from array_record.python import array_record_module
from etils import epath

from gptjax.data import features as class_names
from gptjax.data import token_files
from gptjax.data import tokenizer as tokenizers
from gptjax.errors import Mistake, mistake, raise_all, told_as

STDLIB = 'stdlib'
# In a folder only these are read; a glob or a file's own name may ask for any other text file.
SUFFIXES = ('.txt', '.jsonl', '.ndjson', '.parquet')
JSON_LINES = ('.jsonl', '.ndjson', '.json')
PACKINGS = ('', '.gz', '.zst')
ARRAY_RECORD = '.array_record'  # in the name of each shard of a TFDS dataset
READABLE = 'a readable file', 'fetching it again'


@dataclasses.dataclass(frozen=True)
class Document:
  """One text, and where it came from as messages call it."""

  name: str
  text: str


@dataclasses.dataclass(frozen=True)
class Source:
  """The files a corpus is made of. Reads alike in any process."""

  files: tuple[str, ...]
  text_column: str  # of .jsonl, .parquet and TFDS datasets
  tokenizer: str  # where the one is that made the token files
  skip_bad_text: bool  # otherwise bad text raises
  left_out: tuple[tuple[str, int], ...]  # why, and how many files


def find(source: str, text_column: str, tokenizer: str, skip_bad_text: bool) -> Source:
  """The files of `place,…`, sorted: each a folder, a glob, a file or the word `stdlib`.

  Raises Mistake for a place without any, and for token files without their tokenizer.
  """
  files, left_out, mistakes = set(), collections.Counter(), []
  for place in filter(None, map(str.strip, source.split(','))):
    try:
      wanted, fix = 'a place that can be read', 'installing what it asks for, or another place'
      # epath's for a scheme that it does not know, and for ** in a bucket.
      unknown = KeyError, NotImplementedError
      with told_as(place, wanted, fix, ImportError, OSError, *unknown):
        found, others = _find_stdlib() if place == STDLIB else _find_files(place)
      if not found:
        raise mistake(
          'corpus',
          f'{place!r} without a file to read{_reasons(others)}',
          'a folder with .txt, .jsonl or .parquet files (or .gz, .zst of the first two), '
          "Megatron's .bin and .idx or a TFDS dataset in array_record, a glob, a file, or stdlib",
          "a glob such as 'folder/**/*.md' for other text, or '*.json.gz' for other JSON lines",
        )
      files.update(found)
      left_out.update(others)
    except Mistake as e:
      mistakes.append(e)
  if tokenizer in ('train', 'bytes') and any(file.endswith('.bin') for file in files):
    got = f'{tokenizer!r} and files of tokens'
    wanted = 'the tokenizer that made them'
    mistakes.append(mistake('tokenizer', got, wanted, '--config.tokenizer=folder-of-it'))
  for index in filter(token_files.is_index, files):
    if token_files.tokens_of(index) not in files:
      got = 'an index without its tokens'
      mistakes.append(mistake(index, got, 'the .bin beside it', 'the folder that has both'))
  raise_all(mistakes)
  reasons = tuple(sorted(left_out.items()))
  return Source(tuple(sorted(files)), text_column, tokenizer, skip_bad_text, reasons)


def read(source: Source, file: str, skipped: collections.Counter[str]) -> Iterator[Document]:
  """The documents of one of the source's files, one at a time.

  A text file is one document, exactly as it lies; a JSON line, a Parquet row, an example of a TFDS
  dataset is one. Documents of token files are read as the text that they are. Counts in `skipped`,
  by reason, what is left out. Raises Mistake naming file and line for what cannot be read, and for
  bad text unless the source skips it.
  """
  # The standard library holds Latin-1 and the like on purpose.
  skip_bad_text = source.skip_bad_text or epath.Path(file).is_relative_to(_stdlib())
  for name, text in _reader(file)(source, file):
    try:
      if isinstance(text, Exception):
        raise text
      if isinstance(text, bytes):
        text = text.decode()
      if not isinstance(text, str):
        raise _BadText('not a text', f'column {source.text_column!r} is {type(text).__name__}')
      text.encode()  # JSON can spell half a surrogate pair, which no UTF-8 holds
    except (_BadText, UnicodeError) as e:
      reason, detail = e.args if isinstance(e, _BadText) else ('not UTF-8', str(e))
      if not skip_bad_text:
        raise mistake(name, f'{reason} ({detail})', *_MENDED.get(reason, _MENDED[''])) from e
      skipped[reason] += 1
      continue
    if text:
      yield Document(name, text)
    else:
      skipped['empty'] += 1


def hash_file(file: str) -> str:
  """SHA-256 (hex) of all that decides which documents a file has."""
  kind = _reader(file)
  digest = hashlib.sha256(kind.__name__.encode())
  beside = {
    _read_tokens: [token_files.index_of(file)],
    _read_tfds: [str(epath.Path(file).parent / 'features.json')],
  }
  for path in [file, *(p for p in beside.get(kind, []) if epath.Path(p).exists())]:
    with raw(path) as f:
      digest.update(hashlib.file_digest(f, 'sha256').digest())
  return digest.hexdigest()


def _reader(file: str) -> Callable[[Source, str], Iterator[tuple[str, Any]]]:
  if ARRAY_RECORD in epath.Path(file).name:
    return _read_tfds
  if file.endswith(('.bin', '.idx')):
    return _read_tokens
  if _is(file, JSON_LINES):
    return _read_json_lines
  return _read_parquet if _is(file, ('.parquet',)) else _read_text


def _is(file: str, suffixes: tuple[str, ...]) -> bool:
  return file.lower().endswith(tuple(s + packing for s in suffixes for packing in PACKINGS))


@contextlib.contextmanager
def raw(file: str) -> Iterator[BinaryIO]:
  """A file's bytes as they lie. Raises Mistake if it cannot be read."""
  with told_as(file, *READABLE, OSError), epath.Path(file).open('rb') as f:
    yield f


_MENDED = {
  'no text column': ('it', 'another --config.text_column, or --config.on_bad_text=skip'),
  'bad JSON': ('a JSON object a line', 'to mend it, or --config.on_bad_text=skip'),
  '': ('UTF-8 text', 'to mend it, or --config.on_bad_text=skip'),
}


class _BadText(Exception):
  """One document that is not text: (reason for the counts, detail for the message)."""


def _stdlib() -> epath.Path:
  return epath.Path(sysconfig.get_paths()['stdlib'])


def _find_stdlib() -> tuple[list[str], collections.Counter[str]]:
  root = _stdlib()
  files, left_out = [], collections.Counter()
  for path in _walk(root, set()):
    folders = set(path.relative_to(root).parts[:-1])
    if folders & {'site-packages', 'dist-packages'} or path.suffix != '.py':
      continue  # installed beside the library, or not source
    if folders & {'test', 'tests', 'idle_test'}:
      # Most systems package the tests apart: without them, one Python gives one corpus.
      left_out["the library's own tests"] += 1
    else:
      files.append(str(path))
  return files, left_out


def _find_files(source: str) -> tuple[list[str], collections.Counter[str]]:
  path, left_out = epath.Path(source), collections.Counter()
  if path.is_dir():
    files = []
    # Others write a dataset_info.json too.
    dataset = all((path / name).exists() for name in ('dataset_info.json', 'features.json'))
    for p in _walk(path, set()):
      # A lone .bin may be anything: nanoGPT's wants to be named.
      pair = p.suffix in ('.bin', '.idx') and all(
        p.with_suffix(suffix).exists() for suffix in ('.bin', '.idx')
      )
      if not _is_file(p):
        left_out['not a file'] += 1
      elif ARRAY_RECORD in p.name if dataset else pair or _is(p.name, SUFFIXES):
        files.append(str(p))
      else:
        left_out['another kind of file'] += 1
    return files, left_out
  if path.exists():
    if not _is_file(path):
      raise mistake('corpus', f'{source!r}, which is no file', 'a file', 'another place')
    return [str(path)], left_out
  if not re.search(r'[*?[]', source):
    raise mistake(
      'corpus',
      f'{source!r}, which does not exist',
      'a folder, a glob, a file or stdlib',
      'another place',
    )
  return [p for p in _glob(source) if _is_file(epath.Path(p))], left_out


def _is_file(path: epath.Path) -> bool:
  # epath takes a pipe for one, which would be waited for.
  return path.is_file() if '://' in str(path) else os.path.isfile(path)


def _glob(pattern: str) -> list[str]:
  if '://' not in pattern:
    return glob.glob(pattern, recursive=True)
  parts = pattern.split('/')
  first = next(i for i, part in enumerate(parts) if re.search(r'[*?[]', part))
  root, rest = '/'.join(parts[:first]), '/'.join(parts[first:])
  return [str(path) for path in epath.Path(root).glob(rest)]


def _walk(folder: epath.Path, seen: set[str]) -> Iterator[epath.Path]:
  """All in a folder and those in it, each folder once however many links lead to it."""
  if '://' in str(folder):
    paths = folder.iterdir()
  else:  # epath leaves out names that end in ~
    paths = (folder / name for name in sorted(os.listdir(folder)))
    if (real := os.path.realpath(folder)) in seen:
      return
    seen.add(real)
  for path in paths:
    if path.is_dir():
      yield from _walk(path, seen)
    elif path.exists():  # not a dangling link
      yield path


def _reasons(counts: collections.Counter[str]) -> str:
  return f' ({", ".join(f"{n} {why}" for why, n in sorted(counts.items()))})' if counts else ''


def _read_text(source: Source, file: str) -> Iterator[tuple[str, Any]]:
  with _opened(file) as f:
    yield file, f.read()


def _read_json_lines(source: Source, file: str) -> Iterator[tuple[str, Any]]:
  with _opened(file) as f:
    for number, line in enumerate(f, 1):
      if not line.strip():
        continue
      name = f'{file}:{number}'
      try:
        row = json.loads(line.decode('utf-8-sig' if number == 1 else 'utf-8'))
        if not isinstance(row, dict):
          raise _BadText('not a JSON object', f'a {type(row).__name__}')
        if source.text_column not in row:
          raise _BadText('no text column', _no_column(source.text_column, row))
        yield name, row[source.text_column]
      except (_BadText, UnicodeError) as e:
        yield name, e
      except (ValueError, RecursionError) as e:
        yield name, _BadText('bad JSON', str(e))


def _read_parquet(source: Source, file: str) -> Iterator[tuple[str, Any]]:
  try:
    import pyarrow as pa
    import pyarrow.parquet as pq
  except ImportError as e:
    raise mistake(
      file, 'a Parquet file, but no pyarrow', 'pyarrow installed', "pip install -e '.[parquet]'"
    ) from e
  with _opened(file) as f, told_as(file, *READABLE, pa.ArrowException):
    table, row = pq.ParquetFile(f), 0
    if source.text_column not in table.schema_arrow.names:
      detail = _no_column(source.text_column, table.schema_arrow.names)
      raise mistake(file, f'no text column ({detail})', 'it', 'another --config.text_column')
    # Small batches: a document may be megabytes.
    for batch in table.iter_batches(batch_size=64, columns=[source.text_column]):
      for value in batch.column(0):
        row += 1
        try:
          yield f'{file}:{row}', value.as_py()
        except UnicodeError as e:
          yield f'{file}:{row}', e


def _read_tfds(source: Source, file: str) -> Iterator[tuple[str, Any]]:
  wanted, fix = 'a TFDS dataset in array_record', 'another place'
  with told_as(file, wanted, fix, Exception):
    class_names.check(epath.Path(file).parent)
    features = tfds.features.FeaturesDict.from_config(str(epath.Path(file).parent))
    if source.text_column not in features:
      detail = _no_column(source.text_column, features.keys())
      raise mistake(file, f'no text column ({detail})', 'it', 'another --config.text_column')
    reader = array_record_module.ArrayRecordReader(file)
    for row in range(reader.num_records()):
      example = features.deserialize_example_np(reader.read([row])[0])
      yield f'{file}:{row + 1}', example[source.text_column]


def _read_tokens(source: Source, file: str) -> Iterator[tuple[str, Any]]:
  if token_files.is_index(file):
    return  # read with its .bin
  tokenizer = tokenizers.load(source.tokenizer)
  for row, tokens in enumerate(token_files.read(file, tokenizer.end_of_text), 1):
    name, (least, most) = f'{file}:{row}', (int(tokens.min()), int(tokens.max()))
    if least < 0 or most >= tokenizer.vocab_size:
      fix = 'the --config.tokenizer that made it'
      raise mistake(name, f'token {most}', f'0 to {tokenizer.vocab_size - 1}', fix)
    text = tokenizer.decode(tokens)
    if np.array_equal(tokenizer.encode(text), tokens):
      yield name, text
    else:
      yield name, _BadText('not what the tokenizer makes of its text', f'{text[:40]!r} …')


def _no_column(wanted: str, columns: Any) -> str:
  near = difflib.get_close_matches(wanted, columns, 1)
  hint = f', nearest {near[0]!r}' if near else ''
  return f'{wanted!r} is not among {sorted(columns)[:20]}{hint}'


@contextlib.contextmanager
def _opened(file: str) -> Iterator[BinaryIO]:
  """The file's bytes, unpacked; what the system or the packing complains of is a Mistake."""
  with told_as(file, *READABLE, OSError, EOFError, zlib.error), raw(file) as packed:
    if file.endswith('.gz'):
      with gzip.open(packed) as f:
        yield f
    elif file.endswith('.zst'):
      yield io.BufferedReader(_Zstandard(packed), 1 << 20)
    else:
      yield packed


class _Zstandard(io.RawIOBase):
  """Unpacks Zstandard frames. The library's own reader takes a cut-off file for a whole one."""

  def __init__(self, packed: BinaryIO):
    self._packed, self._error = packed, zstandard.ZstdError
    # The format's own limit, 2 GB, and not the library's.
    self._new_frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
    self._frame, self._ready = None, memoryview(b'')

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._ready:
      left = self._frame.unused_data if self._frame and self._frame.eof else b''
      data = left or self._packed.read(1 << 10)  # few, since they may unpack to very many
      if not data:
        if self._frame and not self._frame.eof:
          raise EOFError('the file ends inside a Zstandard frame')
        return 0
      if self._frame is None or self._frame.eof:
        self._frame = self._new_frame()
      try:
        self._ready = memoryview(self._frame.decompress(data))
      except self._error as e:
        raise OSError(str(e)) from e
    n = min(len(buffer), len(self._ready))
    buffer[:n], self._ready = self._ready[:n], self._ready[n:]
    return n
