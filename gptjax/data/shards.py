"""Documents to token windows to ArrayRecord shards."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from array_record.python import array_record_module

from gptjax import files
from gptjax.data import dataset, spool
from gptjax.data import tokenizer as tokenizers
from gptjax.data.dataset import TRAIN, VALIDATION, Corpus, Split
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import Mistake, mistake, raise_all

# One record a chunk reads fastest at random; tokens hardly compress.
_RECORDS = 'group_size:1,uncompressed'


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
  features = dataset.features(shard.context, tokenizer.vocab_size)
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
    validation_fraction=asked['validation_fraction'],
    digest=_digest(made),
    train=holds[TRAIN],
    validation=holds[VALIDATION],
    unigram_nats=unigram_nats(counts, sum(m.target_counts for m in splits[VALIDATION])),
    duplicates=sum(m.duplicates for m in made),
    skipped=sum(skipped.values()),
    skipped_why=dict(sorted(skipped.items())),
  )
  dataset.write(
    out,
    corpus,
    {s: [m.holds.windows for m in ms] for s, ms in splits.items()},
    {s: {m.shard.file: m.file_bytes for m in ms} for s, ms in splits.items()},
    asked,
  )


def _total(made: Sequence[Made]) -> Split:
  columns = zip(*(dataclasses.astuple(m.holds) for m in made), strict=True)
  return Split(*(sum(c) for c in columns))


def _digest(made: Sequence[Made]) -> str:
  lines = sorted(f'{m.shard.name} {m.digest}\n' for m in made)
  return hashlib.sha256(''.join(lines).encode()).hexdigest()


def _no_windows(split: str, holds: Mapping[str, Split], context: int) -> Mistake:
  documents = sum(h.documents for h in holds.values())
  fewer = ', a smaller --config.context or fewer --config.shards' * bool(holds[split].documents)
  return mistake(
    f'{split} split',
    f'no window of {context} tokens: {holds[split].tokens} tokens in '
    f'{holds[split].documents} of the {documents} documents',
    'one at least',
    'more documents (a file of .txt is one, so cut it into several), another '
    '--config.validation_fraction' + fewer,
  )
