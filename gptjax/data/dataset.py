"""A prepared corpus on disk: a TFDS dataset of windows that knows what it was made from."""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from gptjax.data import features as class_names
from gptjax.data import tokenizer as tokenizers
from gptjax.errors import Mistake, mistake, raise_all, told_as

TRAIN, VALIDATION = 'train', 'validation'
# Raised whenever the same documents and knobs would give other bytes.
FORMAT = 1
_METADATA = 'metadata.json'  # where TFDS keeps a dataset's MetadataDict
AGAIN = 'copying the corpus or preparing it again'


@dataclasses.dataclass(frozen=True)
class Split:
  """What a split holds. `tokens = windows * context + tail_tokens`."""

  documents: int
  bytes: int  # UTF-8 bytes of the documents
  tokens: int  # one end-of-text per document included
  windows: int
  tail_tokens: int  # at the ends of shards, too few for a window: in no window

  @property
  def bytes_per_token(self) -> float:
    """Of its text, end-of-texts paid for."""
    return self.bytes / self.tokens


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A prepared corpus, as its metadata tells it."""

  folder: str
  context: int
  tokenizer: str  # its identity
  vocab_size: int
  end_of_text: int
  seed: int
  validation_fraction: float
  digest: str  # SHA-256 (hex) of all windows, in order
  train: Split
  validation: Split
  unigram_nats: float  # cross-entropy per validation token of the training tokens' frequencies
  duplicates: int  # documents left out because the same text is there already
  skipped: int  # documents and files left out for another reason
  skipped_why: Mapping[str, int]


def features(context: int, vocab_size: int) -> tfds.features.FeaturesDict:
  """What a record holds."""
  dtype = np.uint16 if vocab_size <= 1 << 16 else np.int32
  # 'bytes' writes the array as it lies, several times faster than numbers one by one.
  return tfds.features.FeaturesDict(
    {'tokens': tfds.features.Tensor(shape=(context + 1,), dtype=dtype, encoding='bytes')}
  )


def write(
  out: str,
  corpus: Corpus,
  lengths: Mapping[str, Sequence[int]],
  file_bytes: Mapping[str, Mapping[str, int]],
  asked: Mapping[str, object],
) -> None:
  """Writes the metadata that makes the shards in a folder a corpus.

  By split, `lengths` are the windows of each shard and `file_bytes` the sizes of their files by
  name. `asked` is what the corpus was made from, for `unlike`.
  """
  about = dataclasses.asdict(corpus)
  del about['folder'], about['validation_fraction']  # a corpus may be moved; the other is in asked
  template = tfds.core.ShardedFileTemplate(
    data_dir=epath.Path(out), dataset_name='corpus', filetype_suffix='array_record'
  )
  tfds.folder_dataset.write_metadata(
    data_dir=out,
    features=features(corpus.context, corpus.vocab_size),
    split_infos=[
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=list(lengths[split]),
        num_bytes=sum(file_bytes[split].values()),
        filename_template=template,
      )
      for split in (TRAIN, VALIDATION)
    ],
    check_data=False,  # would need TensorFlow
    description=f'Windows of {corpus.context} + 1 tokens, packed by gptjax.prepare.',
    metadata=tfds.core.MetadataDict(
      format=FORMAT,
      corpus=about,
      asked=dict(asked),
      files={name: size for split in file_bytes.values() for name, size in split.items()},
    ),
  )


def describe(folder: str) -> Corpus:
  """What a prepared folder holds. Raises Mistake if it is missing, unfinished or damaged."""
  metadata = _metadata(folder)
  with told_as(epath.Path(folder) / _METADATA, 'what gptjax.prepare wrote', AGAIN, Exception):
    raise_all(list(_damage(folder, metadata['files'])))
    about = metadata['corpus']
    splits = {split: Split(**about[split]) for split in (TRAIN, VALIDATION)}
    held_out = {'validation_fraction': metadata['asked']['validation_fraction']}
    corpus = Corpus(**about | splits | held_out | {'folder': str(folder)})
    if metadata['format'] != FORMAT or not metadata['files'] or not corpus.validation.bytes > 0:
      raise ValueError(f'format {metadata["format"]}, {len(metadata["files"])} files')
    tokenizer = tokenizers.load(folder)
    mine = tokenizer.identity, tokenizer.vocab_size, tokenizer.end_of_text
    if mine != (corpus.tokenizer, corpus.vocab_size, corpus.end_of_text):
      got, wanted = tokenizer.identity[:12], f'{corpus.tokenizer[:12]}, which made its windows'
      raise mistake(f'tokenizer in {folder}', got, wanted, AGAIN)
  return corpus


def unlike(folder: str, asked: Mapping[str, object]) -> list[str]:
  """How the corpus in a folder differs from what is asked for now; empty if it does not."""
  metadata = _metadata(folder)
  had, want = (
    {'format': m} | a for m, a in ((metadata['format'], metadata['asked']), (FORMAT, asked))
  )
  return [
    f'{k} {had.get(k)} there, {want.get(k)} now'
    for k in sorted(had.keys() | want.keys())
    if had.get(k) != want.get(k)
  ]


class Windows:
  """One split, random access: `[i]` is int [context + 1], in the dtype on disk.

  Safe to share between threads, and cheap to pickle. (TFDS's own batched read is no faster on a
  local disk: it starts threads for every batch.)
  """

  def __init__(self, folder: str, split: str):
    self._folder, self._split = str(folder), split
    with told_as(f'corpus {folder!r}', 'a TFDS dataset', AGAIN, Exception):
      class_names.check(folder)
      builder = tfds.builder_from_directory(folder)
      self._source = builder.as_data_source(split)
      tokens = builder.info.features['tokens']
    self._length = len(self._source)
    self.blank = np.zeros(tokens.shape, tokens.np_dtype)  # like a window, and none

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> np.ndarray:
    if not 0 <= index < self._length:
      raise IndexError(f'window {index} of {self._length}')
    try:
      return self._source[index]['tokens']
    except (RuntimeError, ValueError) as e:
      file, record = self._place(index)
      with told_as(f'{file}, record {record}', 'a readable one', AGAIN, Exception):
        raise e

  def _place(self, index: int) -> tuple[str, int]:
    """The file of a window, and its record there."""
    split = tfds.builder_from_directory(self._folder).info.splits[self._split]
    ends = np.cumsum(split.shard_lengths)
    shard = int(np.searchsorted(ends, index, side='right'))
    name = sorted(split.filenames)[shard]
    return os.path.join(self._folder, name), int(index - (ends[shard - 1] if shard else 0))

  def __repr__(self) -> str:
    return f'Windows({self._folder!r}, {self._split!r})'

  def __reduce__(self) -> tuple:
    return Windows, (self._folder, self._split)  # another process opens the files anew


def open_split(folder: str, split: str) -> Windows:
  """The windows of `train` or `validation`. Raises Mistake as `describe` does."""
  if split not in (TRAIN, VALIDATION):
    raise mistake('split', split, f'{TRAIN} or {VALIDATION}', 'one of them')
  return windows(describe(folder), split)


def windows(corpus: Corpus, split: str) -> Windows:
  """The windows of a split of a corpus that was described. Raises Mistake if they are not those."""
  opened, wanted = Windows(corpus.folder, split), getattr(corpus, split).windows
  if len(opened) != wanted:
    got = f'{len(opened)} windows in its dataset_info.json'
    raise mistake(f'{split} split of {corpus.folder}', got, f'{wanted}, as were made', AGAIN)
  return opened


def bits_per_byte(nats: float, split: Split) -> float:
  """A loss in nats per token of a split as bits per byte of its text, end-of-texts paid for."""
  return nats / math.log(2) / split.bytes_per_token


def _metadata(folder: str) -> dict:
  path = epath.Path(folder)
  if '://' in str(folder):
    fix = 'copying it here, or mounting the bucket'
    raise mistake('corpus', repr(folder), 'a local folder: its shards are read at random', fix)
  if not path.exists():
    state = 'does not exist'
    if epath.Path(f'{str(path).rstrip("/")}.incomplete').exists():
      state += ' (an unfinished preparation lies beside it)'
  elif not (path / _METADATA).exists() or not (path / 'dataset_info.json').exists():
    state = 'is not a prepared corpus'
  else:
    with told_as(path / _METADATA, 'what gptjax.prepare wrote', AGAIN, OSError, ValueError):
      metadata = json.loads((path / _METADATA).read_bytes())
    if isinstance(metadata, dict) and {'format', 'corpus', 'asked', 'files'} <= metadata.keys():
      return metadata
    state = 'is a dataset gptjax.prepare did not make'
  fix = 'running gptjax.prepare with this folder as --config.out'
  if path.exists() and not (path / _METADATA).exists():
    fix = 'gptjax.prepare with --config.source=this folder, and what it makes'
  raise mistake('corpus', f'{folder!r}, which {state}', 'a prepared corpus', fix)


def _damage(folder: str, files: Mapping[str, int]) -> Iterator[Mistake]:
  for name, size in files.items():
    path = epath.Path(folder) / name
    found = f'{path.stat().length} bytes' if path.exists() else 'no such file'
    if found != f'{size} bytes':
      yield mistake(str(path), found, f'{size} bytes', AGAIN)
