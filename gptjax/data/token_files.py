"""Documents of the token files of others: nanoGPT's .bin, and Megatron's .bin with its .idx."""

import dataclasses
import os
import struct
from collections.abc import Iterator

import numpy as np

from gptjax.errors import mistake, told_as

STRETCH = 1 << 24  # tokens looked at together
_MAGIC = b'MMIDIDX\x00\x00'
# By the code in the header (Megatron-LM, megatron/core/datasets/indexed_dataset.py).
_DTYPES = {1: 'u1', 2: 'i1', 3: '<i2', 4: '<i4', 5: '<i8', 8: '<u2'}


def is_index(file: str) -> bool:
  """Whether it is a Megatron index, which is read with the .bin beside it."""
  return file.endswith('.idx')


def index_of(file: str) -> str:
  """The index beside a .bin file, which may not be there."""
  return file.removesuffix('.bin') + '.idx'


def read(file: str, end_of_text: int) -> Iterator[np.ndarray]:
  """The documents of a .bin file as arrays of tokens, without the end-of-text between them.

  Raises:
    Mistake: for a file that is cut off or of another kind.
  """
  wanted = "nanoGPT's token file, or Megatron's with its index"
  with told_as(file, wanted, 'copying it again, with the .idx', OSError, ValueError, struct.error):
    if os.path.exists(index_of(file)):
      yield from _read_megatron(file, end_of_text)
    else:
      yield from _cut(np.memmap(file, '<u2', 'r'), end_of_text)


def _read_megatron(file: str, end_of_text: int) -> Iterator[np.ndarray]:
  index = _Index.of(index_of(file))
  tokens = np.memmap(file, index.dtype, 'r')
  if len(tokens) < int(index.lengths.sum()):
    got, wanted = f'{len(tokens)} tokens', f'{index.lengths.sum()}, as its index says'
    raise mistake(file, got, wanted, 'copying both files again')
  for first, end in zip(index.documents, index.documents[1:], strict=False):
    if first < end:
      start = index.pointers[first] // index.dtype.itemsize
      yield from _cut(tokens[start : start + index.lengths[first:end].sum()], end_of_text)


def _cut(tokens: np.ndarray, end_of_text: int) -> Iterator[np.ndarray]:
  """Cuts at each end-of-text; a stretch at a time, since the file may be larger than memory."""
  start = 0
  for at in range(0, len(tokens), STRETCH):
    for end in at + np.flatnonzero(tokens[at : at + STRETCH] == end_of_text):
      if end > start:
        yield np.asarray(tokens[start:end])
      start = int(end) + 1
  if start < len(tokens):
    yield np.asarray(tokens[start:])


@dataclasses.dataclass(frozen=True)
class _Index:
  """A Megatron index: sequences of tokens, and which of them are a document."""

  dtype: np.dtype
  lengths: np.ndarray  # tokens of each sequence
  pointers: np.ndarray  # bytes before each sequence
  documents: np.ndarray  # the first sequence of each document, and the number of sequences

  @classmethod
  def of(cls, file: str) -> '_Index':
    with open(file, 'rb') as f:
      if f.read(len(_MAGIC)) != _MAGIC:
        raise mistake(file, 'another kind of file', "Megatron's index", 'moving it away')
      version, code, sequences, documents = struct.unpack('<QBQQ', f.read(25))
      if version != 1 or code not in _DTYPES:
        got = f'version {version}, dtype {code}'
        raise mistake(file, got, f'version 1, dtype {[*_DTYPES]}', 'another tool to convert it')
      lengths = np.fromfile(f, '<i4', sequences)
      pointers = np.fromfile(f, '<i8', sequences)
      starts = np.fromfile(f, '<i8', documents)
    if len(starts) != documents:
      raise mistake(file, 'a file that is cut off', 'a whole index', 'copying it again')
    return cls(np.dtype(_DTYPES[code]), lengths.astype(np.int64), pointers, starts)
