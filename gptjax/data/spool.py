"""Documents sorted into buckets on disk, so that a bucket can be read in an order of its own.

Many writers, one part each; a reader merges the parts of one bucket. A record is the document's
key, its length, its UTF-8 bytes. What a bucket yields depends only on what was put in, not on
who put it, when, or in which part.
"""

import collections
import hashlib
import pathlib
import struct
from collections.abc import Iterator
from types import TracebackType

_RECORD = struct.Struct('<16sQ')
_BUFFERED = 32 << 20  # bytes held by a writer before it appends to its files


def key(text: bytes, seed: int) -> bytes:
  """A seeded hash of a document's content, 16 bytes."""
  return hashlib.blake2b(text, digest_size=16, key=seed.to_bytes(8, 'little')).digest()


def uniform(key: bytes) -> float:
  """A number in [0, 1) from a key, independent of `bucket`."""
  return int.from_bytes(key[:6], 'little') / (1 << 48)


def bucket(key: bytes, buckets: int) -> int:
  """One of `buckets`, from a key."""
  return int.from_bytes(key[8:], 'little') % buckets


def names(folder: str) -> set[str]:
  """The buckets that hold anything."""
  return {path.name.rsplit('.part', 1)[0] for path in pathlib.Path(folder).glob('*.part*')}


class Writer:
  """Writes the documents of one part to their buckets, instead of what it wrote there before."""

  def __init__(self, folder: str, part: int):
    self._folder, self._part = pathlib.Path(folder), part
    for left in self._folder.glob(f'*.part{part:05d}'):
      left.unlink()  # of a writer that died
    self._buffers, self._held = collections.defaultdict(bytearray), 0

  def add(self, bucket: str, key: bytes, text: bytes) -> None:
    self._buffers[bucket] += _RECORD.pack(key, len(text)) + text
    self._held += len(text)
    if self._held > _BUFFERED:
      self._flush()

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if error is None:
      self._flush()

  def _flush(self) -> None:
    # Opened anew each time: thousands of buckets would be too many open files.
    for name, data in self._buffers.items():
      with (self._folder / f'{name}.part{self._part:05d}').open('ab') as f:
        f.write(data)
    self._buffers.clear()
    self._held = 0


class Bucket:
  """Reads one bucket in the order of its keys, each key once. Holds no text, only where it lies.

  `duplicates` counts the documents left out because the same text is there already.
  """

  def __init__(self, folder: str, name: str):
    self._paths = sorted(pathlib.Path(folder).glob(f'{name}.part*'))
    self._places, total = {}, 0
    for i, path in enumerate(self._paths):
      end = path.stat().st_size
      with path.open('rb') as f:
        while f.tell() < end:
          key, length = _RECORD.unpack(f.read(_RECORD.size))
          self._places[key] = (i, f.tell(), length)
          f.seek(length, 1)
          total += 1
    self.duplicates = total - len(self._places)

  def __len__(self) -> int:
    return len(self._places)

  def __iter__(self) -> Iterator[bytes]:
    files = [path.open('rb') for path in self._paths]
    try:
      for _, (i, start, length) in sorted(self._places.items()):
        files[i].seek(start)
        yield files[i].read(length)
    finally:
      for f in files:
        f.close()
