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


def tokens_of(index: str) -> str:
  """The .bin file that an index is of, which may not be there."""
  return index.removesuffix('.idx') + '.bin'


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
  starts = np.concatenate([[0], np.cumsum(index.lengths)])
  if len(tokens) != starts[-1]:
    got, wanted = f'{len(tokens)} tokens', f'{starts[-1]}, as its index says'
    raise mistake(file, got, wanted, 'copying both files again')
  if not index.fits(starts):
    raise mistake(index_of(file), 'numbers in no order', "Megatron's index", 'copying it again')
  for first, end in zip(index.documents, index.documents[1:], strict=False):
    yield from _cut(tokens[starts[first] : starts[end]], end_of_text)


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
      header = struct.Struct('<QBQQ')
      version, code, sequences, documents = header.unpack(f.read(header.size))
      if version != 1 or code not in _DTYPES:
        got = f'version {version}, dtype {code}'
        raise mistake(file, got, f'version 1, dtype {[*_DTYPES]}', 'another tool to convert it')
      size = len(_MAGIC) + header.size + sequences * (4 + 8) + documents * 8
      if os.path.getsize(file) != size:
        got = f'{os.path.getsize(file)} bytes'
        raise mistake(file, got, f'{size}, as its header says', 'copying it again')
      lengths = np.fromfile(f, '<i4', sequences)
      pointers = np.fromfile(f, '<i8', sequences)
      starts = np.fromfile(f, '<i8', documents)
    return cls(np.dtype(_DTYPES[code]), lengths.astype(np.int64), pointers, starts)

  def fits(self, starts: np.ndarray) -> bool:
    """Whether its numbers are as Megatron writes them: sequences, and documents, end to end."""
    documents = self.documents
    return bool(
      (self.lengths >= 0).all()
      and (self.pointers == starts[:-1] * self.dtype.itemsize).all()
      and (documents[0] == 0 and documents[-1] == len(self.lengths) if len(documents) else False)
      and (np.diff(documents) >= 0).all()
    )
