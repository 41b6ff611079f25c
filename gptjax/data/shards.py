"""Documents to token windows to ArrayRecord shards that are a TFDS dataset, and back."""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath

from gptjax import files
from gptjax.data import spool
from gptjax.data import tokenizer as tokenizers
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import Mistake, mistake, raise_all, told_as

TRAIN, VALIDATION = 'train', 'validation'
# Raised whenever the same documents and knobs would give other bytes.
FORMAT = 1
_METADATA = 'metadata.json'  # where TFDS keeps a dataset's MetadataDict
AGAIN = 'copying the corpus or preparing it again'
# One record a chunk reads fastest at random; tokens hardly compress.
_RECORDS = 'group_size:1,uncompressed'


@dataclasses.dataclass(frozen=True)
class Split:
  """What a split holds. `tokens = windows * context + tail_tokens`."""

  documents: int
  bytes: int  # UTF-8 bytes of the documents
  tokens: int  # one end-of-text per document included
  windows: int
  tail_tokens: int  # at the ends of shards, too few for a window: in no window


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A prepared corpus, as its metadata tells it."""

  folder: str
  context: int
  tokenizer: str  # its identity
  vocab_size: int
  end_of_text: int
  seed: int
  digest: str  # SHA-256 (hex) of all windows, in order
  train: Split
  validation: Split
  unigram_nats: float  # cross-entropy per validation token of the training tokens' frequencies
  duplicates: int  # documents left out because the same text is there already
  skipped: int  # documents and files left out for another reason
  skipped_why: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Shard:
  """One shard to make: which, from what, and where to. All that `make_shard` needs."""

  split: str
  index: int
  count: int  # shards of this split
  spool: str
  out: str  # holds the tokenizer too
  context: int

  @property
  def name(self) -> str:
    return f'{self.split}-{self.index:05d}'

  @property
  def file(self) -> str:
    return f'corpus-{self.split}.array_record-{self.index:05d}-of-{self.count:05d}'


@dataclasses.dataclass(frozen=True)
class Made:
  """What one shard came to."""

  shard: Shard
  holds: Split
  duplicates: int
  digest: str  # SHA-256 (hex) of its windows as little-endian int32
  file_bytes: int
  token_counts: np.ndarray  # int64 [vocabulary]: the tokens of `holds`
  target_counts: np.ndarray  # int64 [vocabulary]: those of them in windows


def place(key: bytes, validation_fraction: float, shards: int) -> tuple[str, int]:
  """The split and shard of a document, from its seeded hash alone."""
  if spool.uniform(key) < validation_fraction:
    return VALIDATION, spool.bucket(key, shard_count(VALIDATION, validation_fraction, shards))
  return TRAIN, spool.bucket(key, shards)


def shard_count(split: str, validation_fraction: float, shards: int) -> int:
  """How many shards a split has: validation as many as keep its shards the size of the others."""
  return shards if split == TRAIN else max(1, round(shards * validation_fraction))


def bucket_name(split: str, index: int) -> str:
  """The spool's name of what becomes a shard."""
  return f'{split}-{index:05d}'


def make_shard(shard: Shard) -> Made:
  """Spooled documents to one ArrayRecord file of windows.

  A pure function of the spooled documents, the tokenizer and `shard`, whoever runs it. The file
  appears under its name only when whole, and what was made before is not made again. Holds one
  document's tokens at a time.
  """
  if made := _made_before(shard):
    return made
  tokenizer = tokenizers.load(shard.out)
  documents = spool.Bucket(shard.spool, bucket_name(shard.split, shard.index))
  counted = _Counted(documents, tokenizer)
  features = _features(shard.context, tokenizer.vocab_size)
  digest, targets, windows = hashlib.sha256(), np.zeros(tokenizer.vocab_size, np.int64), 0

  path = os.path.join(shard.out, shard.file)
  with _writer(path + '.incomplete') as writer:
    for rows in pack(counted, tokenizer.end_of_text, shard.context):
      digest.update(rows.astype('<i4').tobytes())
      targets += np.bincount(rows[:, 1:].reshape(-1), minlength=tokenizer.vocab_size)
      windows += len(rows)
      for row in rows.astype(features['tokens'].np_dtype):
        writer.write(features.serialize_example({'tokens': row}))
  os.replace(path + '.incomplete', path)

  tokens = int(counted.token_counts.sum())
  made = Made(
    shard=shard,
    holds=Split(
      documents=len(documents),
      bytes=counted.bytes,
      tokens=tokens,
      windows=windows,
      tail_tokens=tokens - windows * shard.context,
    ),
    duplicates=documents.duplicates,
    digest=digest.hexdigest(),
    file_bytes=os.path.getsize(path),
    token_counts=counted.token_counts,
    target_counts=targets,
  )
  _note_made(made)
  return made


@contextlib.contextmanager
def _writer(path: str) -> Iterator[array_record_module.ArrayRecordWriter]:
  try:
    writer = array_record_module.ArrayRecordWriter(path, _RECORDS)
    yield writer
    writer.close()
  except RuntimeError as e:  # what this library makes of a full disk
    raise OSError(str(e)) from e


def _note(shard: Shard) -> pathlib.Path:
  """Where it is noted what a shard came to, once it is made."""
  return pathlib.Path(shard.spool) / f'{shard.name}.made'


def _note_made(made: Made) -> None:
  about = {'holds': dataclasses.asdict(made.holds)}
  about |= {name: getattr(made, name) for name in ('duplicates', 'digest', 'file_bytes')}
  arrays = {name: getattr(made, name) for name in ('token_counts', 'target_counts')}
  data = io.BytesIO()
  np.savez(data, about=json.dumps(about), **arrays)
  files.write_whole(_note(made.shard), data.getvalue())


def _made_before(shard: Shard) -> Made | None:
  if not _note(shard).exists():
    return None
  with np.load(_note(shard)) as noted:
    about = json.loads(str(noted['about']))
    arrays = {name: noted[name] for name in ('token_counts', 'target_counts')}
  about['holds'] = Split(**about['holds'])
  made = Made(shard=shard, **about, **arrays)
  path = os.path.join(shard.out, shard.file)
  return made if os.path.exists(path) and os.path.getsize(path) == made.file_bytes else None


class _Counted:
  """Tokens of each document, end-of-text last, counted as they pass."""

  def __init__(self, documents: Iterable[bytes], tokenizer: Tokenizer):
    self._documents, self._tokenizer = documents, tokenizer
    self._end = np.int32(tokenizer.end_of_text)
    self.bytes, self.token_counts = 0, np.zeros(tokenizer.vocab_size, np.int64)

  def __iter__(self) -> Iterator[np.ndarray]:
    for text in self._documents:
      tokens = np.append(self._tokenizer.encode(text.decode()), self._end)
      self.bytes += len(text)
      self.token_counts += np.bincount(tokens, minlength=len(self.token_counts))
      yield tokens


def pack(documents: Iterable[np.ndarray], end_of_text: int, context: int) -> Iterator[np.ndarray]:
  """Token arrays, each ending in end-of-text, to int [some windows, context + 1].

  The stream starts with one more end-of-text, so that the first document follows one like every
  other, and every token of every document is a target exactly once, but for the tail.
  """
  held, length = [np.array([end_of_text], np.int32)], 1
  for tokens in documents:
    held.append(tokens)
    length += len(tokens)
    if length > context:
      stream, windows = np.concatenate(held), (length - 1) // context
      yield np.lib.stride_tricks.sliding_window_view(stream, context + 1)[::context][:windows]
      held, length = [stream[windows * context :]], length - windows * context


def unigram_nats(train: np.ndarray, targets: np.ndarray) -> float:
  """Cross-entropy per target in nats under the add-one-smoothed training frequencies.

  Both are int [vocabulary]: counts of the training tokens and of the targets.
  """
  log_frequency = np.log((train + 1) / (train.sum() + len(train)))
  return float(-(targets * log_frequency).sum() / targets.sum())


def finish(
  out: str,
  made: Sequence[Made],
  *,
  context: int,
  seed: int,
  skipped: Mapping[str, int],
  asked: Mapping[str, object],
) -> None:
  """Writes the metadata that makes finished shards a corpus.

  `asked` is what the corpus was made from, for `unlike`. Raises Mistake if a split is empty.
  """
  tokenizer = tokenizers.load(out)
  splits = {s: [m for m in made if m.shard.split == s] for s in (TRAIN, VALIDATION)}
  holds = {s: _total(ms) for s, ms in splits.items()}
  raise_all([_no_windows(s, holds, context) for s in splits if not holds[s].windows])
  counts = sum(m.token_counts for m in splits[TRAIN])
  corpus = Corpus(
    folder='',
    context=context,
    tokenizer=tokenizer.identity,
    vocab_size=tokenizer.vocab_size,
    end_of_text=tokenizer.end_of_text,
    seed=seed,
    digest=_digest(made),
    train=holds[TRAIN],
    validation=holds[VALIDATION],
    unigram_nats=unigram_nats(counts, sum(m.target_counts for m in splits[VALIDATION])),
    duplicates=sum(m.duplicates for m in made),
    skipped=sum(skipped.values()),
    skipped_why=dict(sorted(skipped.items())),
  )
  about = dataclasses.asdict(corpus)
  del about['folder']  # a corpus may be moved
  template = tfds.core.ShardedFileTemplate(
    data_dir=epath.Path(out), dataset_name='corpus', filetype_suffix='array_record'
  )
  tfds.folder_dataset.write_metadata(
    data_dir=out,
    features=_features(context, tokenizer.vocab_size),
    split_infos=[
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[m.holds.windows for m in ms],
        num_bytes=sum(m.file_bytes for m in ms),
        filename_template=template,
      )
      for split, ms in splits.items()
    ],
    check_data=False,  # would need TensorFlow
    description=f'Windows of {context} + 1 tokens, packed by gptjax.prepare.',
    metadata=tfds.core.MetadataDict(
      format=FORMAT,
      corpus=about,
      asked=dict(asked),
      files={m.shard.file: m.file_bytes for m in made},
    ),
  )


def describe(folder: str) -> Corpus:
  """What a prepared folder holds. Raises Mistake if it is missing, unfinished or damaged."""
  metadata = _metadata(folder)
  with told_as(epath.Path(folder) / _METADATA, 'what gptjax.prepare wrote', AGAIN, Exception):
    raise_all(list(_damage(folder, metadata['files'])))
    about = metadata['corpus']
    splits = {split: Split(**about[split]) for split in (TRAIN, VALIDATION)}
    corpus = Corpus(**about | splits | {'folder': str(folder)})
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
      self._source = tfds.builder_from_directory(folder).as_data_source(split)
    self._length = len(self._source)

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
  holds = getattr(describe(folder), split)
  windows = Windows(folder, split)
  if len(windows) != holds.windows:
    got = f'{len(windows)} windows in its dataset_info.json'
    raise mistake(f'{split} split of {folder}', got, f'{holds.windows}, as were made', AGAIN)
  return windows


def bits_per_byte(nats: float, split: Split) -> float:
  """A loss in nats per token of a split as bits per byte of its text, end-of-texts paid for."""
  return nats / math.log(2) * split.tokens / split.bytes


def _features(context: int, vocab_size: int) -> tfds.features.FeaturesDict:
  dtype = np.uint16 if vocab_size <= 1 << 16 else np.int32
  # 'bytes' writes the array as it lies, several times faster than numbers one by one.
  return tfds.features.FeaturesDict(
    {'tokens': tfds.features.Tensor(shape=(context + 1,), dtype=dtype, encoding='bytes')}
  )


def _total(made: Sequence[Made]) -> Split:
  columns = zip(*(dataclasses.astuple(m.holds) for m in made), strict=True)
  return Split(*(sum(c) for c in columns))


def _digest(made: Sequence[Made]) -> str:
  lines = sorted(f'{m.shard.name} {m.digest}\n' for m in made)
  return hashlib.sha256(''.join(lines).encode()).hexdigest()


def _no_windows(split: str, holds: Mapping[str, Split], context: int) -> Mistake:
  documents = sum(h.documents for h in holds.values())
  return mistake(
    f'{split} split',
    f'no window of {context} tokens: {holds[split].tokens} tokens in '
    f'{holds[split].documents} of the {documents} documents',
    'one at least',
    'more documents (a file of .txt is one, so cut it into several), a smaller --config.context, '
    'fewer --config.shards or another --config.validation_fraction',
  )


def _metadata(folder: str) -> dict:
  path = epath.Path(folder)
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
  raise mistake('corpus', f'{folder!r}, which {state}', 'a prepared corpus', fix)


def _damage(folder: str, files: Mapping[str, int]) -> Iterator[Mistake]:
  for name, size in files.items():
    path = epath.Path(folder) / name
    found = f'{path.stat().length} bytes' if path.exists() else 'no such file'
    if found != f'{size} bytes':
      yield mistake(str(path), found, f'{size} bytes', AGAIN)
