"""Documents from text, JSON lines, Parquet, or the standard library of this Python."""

import collections
import contextlib
import dataclasses
import difflib
import glob
import gzip
import io
import json
import re
import sysconfig
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import zstandard
from etils import epath

from gptjax.errors import mistake, told_as

STDLIB = 'stdlib'
# In a folder only these are read; a glob or a file's own name may ask for any other text file.
SUFFIXES = ('.txt', '.jsonl', '.parquet')
PACKINGS = ('', '.gz', '.zst')
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
  text_column: str  # of .jsonl and .parquet
  skip_bad_text: bool  # otherwise bad text raises
  left_out: tuple[tuple[str, int], ...]  # why, and how many files


def find(source: str, text_column: str, skip_bad_text: bool) -> Source:
  """The files of a folder, a glob, a file or the word `stdlib`, sorted.

  Raises Mistake if there is none.
  """
  if source == STDLIB:
    files, left_out = _find_stdlib()
    skip_bad_text = True  # the standard library holds Latin-1 and the like on purpose
  else:
    files, left_out = _find_files(source)
  if not files:
    raise mistake(
      'corpus',
      f'{source!r} without a file to read{_reasons(left_out)}',
      'a folder with .txt, .jsonl or .parquet files (or .gz, .zst of the first two), a glob, '
      'a file, or stdlib',
      "a glob such as 'folder/**/*.md' for text files of another kind",
    )
  return Source(tuple(sorted(files)), text_column, skip_bad_text, tuple(sorted(left_out.items())))


def read(source: Source, file: str, skipped: collections.Counter[str]) -> Iterator[Document]:
  """The documents of one of the source's files, one at a time.

  A text file is one document, exactly as it lies; a JSON line or a Parquet row is one. Counts in
  `skipped`, by reason, what is left out. Raises Mistake naming file and line for what cannot be
  read, and for bad text unless the source skips it.
  """
  kind = next((k for k in SUFFIXES if any(file.endswith(k + p) for p in PACKINGS)), '.txt')
  documents = {'.txt': _read_text, '.jsonl': _read_json_lines, '.parquet': _read_parquet}[kind]
  for name, text in documents(source, file):
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
      if not source.skip_bad_text:
        raise mistake(
          name, f'{reason} ({detail})', 'UTF-8 text', 'to mend it, or --config.on_bad_text=skip'
        ) from e
      skipped[reason] += 1
      continue
    if text:
      yield Document(name, text)
    else:
      skipped['empty'] += 1


@contextlib.contextmanager
def raw(file: str) -> Iterator[BinaryIO]:
  """A file's bytes as they lie. Raises Mistake if it cannot be read."""
  with told_as(file, *READABLE, OSError), epath.Path(file).open('rb') as f:
    yield f


class _BadText(Exception):
  """One document that is not text: (reason for the counts, detail for the message)."""


def _find_stdlib() -> tuple[list[str], collections.Counter[str]]:
  root = epath.Path(sysconfig.get_paths()['stdlib'])
  files, left_out = [], collections.Counter()
  for path in _walk(root):
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
    for p in _walk(path):
      if any(p.name.endswith(k + packing) for k in SUFFIXES for packing in PACKINGS):
        files.append(str(p))
      else:
        left_out['another kind of file'] += 1
    return files, left_out
  if path.exists():
    return [str(path)], left_out
  if not re.search(r'[*?[]', source):
    raise mistake(
      'corpus',
      f'{source!r}, which does not exist',
      'a folder, a glob, a file or stdlib',
      'another --config.source',
    )
  found = glob.glob(source, recursive=True)
  return [p for p in found if not epath.Path(p).is_dir()], left_out


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
  for path in folder.iterdir():
    if path.is_dir():
      yield from _walk(path)
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
        row = json.loads(line.decode())
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
    self._new_frame = zstandard.ZstdDecompressor().decompressobj
    self._frame, self._ready = None, memoryview(b'')

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._ready:
      left = self._frame.unused_data if self._frame and self._frame.eof else b''
      data = left or self._packed.read(1 << 17)
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
