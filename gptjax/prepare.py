"""Turns a corpus into packed windows of tokens on disk.

python -m gptjax.prepare --config=configs/corpus.py --config.source=folder --config.out=data/corpus
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool

from ml_collections import ConfigDict

from gptjax import flags
from gptjax.data import dataset, engines, reading, shards, sources, spool
from gptjax.data import tokenizer as tokenizers
from gptjax.data.engines import Run
from gptjax.errors import Mistake, mistake, raise_all, told_as

# A tokenizer is trained on the first training documents, in seeded order, up to this much text.
TOKENIZER_BYTES = 10_000_000
NOTE = 'asked.json'  # in the unfinished folder: what was asked for
SPOOL = 'spool'  # in the unfinished folder: documents sorted into shards


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What a corpus is made from. Raises Mistake for all that cannot be, at once."""

  source: str
  text_column: str
  context: int
  tokenizer: str  # 'train', 'bytes', or where one is saved
  vocab_size: int  # of the tokenizer to train
  seed: int
  validation_fraction: float
  shards: int
  on_bad_text: str  # 'raise' or 'skip'

  def __post_init__(self):
    least = {'context': 1, 'vocab_size': 1, 'seed': 0, 'shards': 1}
    mistakes = [
      mistake(k, getattr(self, k), f'{n} or more', f'--config.{k}={max(n, 1)}')
      for k, n in least.items()
      if getattr(self, k) < n
    ]
    if not self.source:
      mistakes.append(mistake('source', 'none', 'what to read', '--config.source=stdlib'))
    if self.seed >= 1 << 64:
      mistakes.append(mistake('seed', self.seed, 'less than 2**64', '--config.seed=0'))
    if not 0 < self.validation_fraction < 1:
      mistakes.append(
        mistake(
          'validation_fraction',
          self.validation_fraction,
          'more than 0 and less than 1',
          '--config.validation_fraction=0.01',
        )
      )
    if self.on_bad_text not in ('raise', 'skip'):
      mistakes.append(
        mistake('on_bad_text', repr(self.on_bad_text), 'raise or skip', '--config.on_bad_text=skip')
      )
    raise_all(mistakes)


def main(config: ConfigDict) -> None:
  """Prepares the corpus a config asks for and prints what it holds."""
  knobs = {'out', 'workers', 'beam', *(field.name for field in dataclasses.fields(Recipe))}
  if knobs != {*config}:
    got, wanted = (f'a config of {", ".join(sorted(names))}' for names in (config, knobs))
    raise mistake('--config', got, wanted, '--config=configs/corpus.py')
  if not config.out or re.search('^~|[=,]|://', config.out):
    wanted = 'the local folder to make, without ~ before and = or , in its name'
    raise mistake('out', config.out or 'none', wanted, '--config.out=data/corpus')
  if config.workers < 0:
    raise mistake('workers', config.workers, '0 (one per core) or more', '--config.workers=0')
  recipe = Recipe(
    source=config.source,
    text_column=config.text_column,
    context=config.context,
    tokenizer=config.tokenizer,
    vocab_size=config.vocab_size,
    seed=config.seed,
    validation_fraction=config.validation_fraction,
    shards=config.shards,
    on_bad_text=config.on_bad_text,
  )
  if config.beam:
    engine = engines.beam(config.beam.split(), f'{config.out}.beam')
  else:
    engine = engines.processes(config.workers or engines.cores())
  corpus, made = prepare(recipe, config.out, engine)
  print(f'{config.out} was already prepared: nothing to do.' if not made else config.out)
  print(table(corpus))


def prepare(
  recipe: Recipe, out: str, engine: contextlib.AbstractContextManager[Run]
) -> tuple[dataset.Corpus, bool]:
  """Makes the folder `out`, or finds it made by the same recipe from the same files (False).

  Works beside it in `<out>.incomplete` and renames that at the end, so `out` is never half made.
  What was finished there by the same recipe, before it was stopped, is not done again.
  Raises Mistake if `out` holds anything else, or for what `sources` and `shards` refuse.
  """
  skip = recipe.on_bad_text == 'skip'
  source = sources.find(recipe.source, recipe.text_column, recipe.tokenizer, skip)
  given = None if recipe.tokenizer == 'train' else _given_tokenizer(recipe.tokenizer)
  wanted, fix = 'a folder that can be made', 'more room or another --config.out'
  with told_as(f'out {out!r}', wanted, fix, OSError, UnicodeError, RuntimeError):
    out.encode()
    target = pathlib.Path(out).resolve()  # a link cannot be replaced by a folder
    there = target.exists() and not (target.is_dir() and not any(target.iterdir()))
  if not target.name:
    raise mistake('out', out, 'a folder to make', '--config.out=data/corpus')
  work = target.with_name(target.name + '.incomplete')
  memory = 'fewer --config.workers or more --config.shards'
  with (
    told_as(f'out {out!r}', wanted, fix, OSError),
    told_as('a worker', 'memory for one shard a worker', memory, BrokenProcessPool),
    engine as run,
  ):
    if there:
      _refuse_unlike(out, _asked(recipe, given, _hashed(source, run)))
      return dataset.describe(out), False
    # First, so that a place where nothing can be made costs no reading.
    work.mkdir(parents=True, exist_ok=True)
    if not (work / NOTE).exists() and any(work.iterdir()):
      fix = 'moving it away, or another --config.out'
      raise mistake(work, 'something else', 'unfinished work or nothing', fix)
    try:
      digests = _hashed(source, run)
      asked = _asked(recipe, given, digests)
      # Parts are dealt in the order of files' names, which may be others now.
      _take_over(work, asked | {'order': digests})
      _make(recipe, source, given, asked, str(work), run)
    except Mistake:  # another recipe or other files are needed
      shutil.rmtree(work, ignore_errors=True)
      raise
    work.rename(target)
    os.remove(target / NOTE)  # last, so that until all is there nothing is missing for going on
  return dataset.describe(out), True


def _take_over(work: pathlib.Path, asked: dict[str, object]) -> None:
  """Empties a folder of unfinished work unless the same was asked for."""
  note = work / NOTE
  text = json.dumps(asked | {'format': dataset.FORMAT}, sort_keys=True)
  if not note.exists() or note.read_text() != text:
    shutil.rmtree(work)
    work.mkdir()
    note.write_text(text)
  elif any((work / SPOOL).glob('*.read')):
    print(f'going on with the unfinished {work}', flush=True)


def table(corpus: dataset.Corpus) -> str:
  """What a corpus holds, for people."""
  rows = [('', 'train', 'validation')]
  for label, of in (
    ('documents', lambda s: f'{s.documents:,}'),
    ('bytes', lambda s: f'{s.bytes:,}'),
    ('tokens', lambda s: f'{s.tokens:,}'),
    ('bytes per token', lambda s: f'{s.bytes_per_token:.3f}'),
    (f'windows of {corpus.context}', lambda s: f'{s.windows:,}'),
    ('tail tokens (in no window)', lambda s: f'{s.tail_tokens:,}'),
  ):
    rows.append((label, of(corpus.train), of(corpus.validation)))
  lines = [f'{a:<28}{b:>16}{c:>16}' for a, b, c in rows]
  skipped = ', '.join(f'{n:,} {why}' for why, n in corpus.skipped_why.items())
  nats = corpus.unigram_nats
  bits = dataset.bits_per_byte(nats, corpus.validation)
  for label, value in (
    ('duplicates left out', f'{corpus.duplicates:,}'),
    ('skipped', f'{corpus.skipped:,}' + (f' ({skipped})' if skipped else '')),
    ('vocabulary', f'{corpus.vocab_size:,}'),
    ('tokenizer', corpus.tokenizer[:16]),
    ('contents', corpus.digest[:16]),
    ('unigram baseline', f'{nats:.4f} nats per token, {bits:.4f} bits per byte'),
  ):
    lines.append(f'{label:<28}{value}')
  return '\n'.join(lines)


def _make(
  recipe: Recipe,
  source: sources.Source,
  given: tokenizers.Tokenizer | None,
  asked: dict[str, object],
  work: str,
  run: Run,
) -> None:
  spooled = os.path.join(work, SPOOL)
  os.makedirs(spooled, exist_ok=True)
  skipped = collections.Counter(dict(source.left_out))
  parts = [
    reading.Part(source, files, i, spooled, recipe.seed, recipe.validation_fraction, recipe.shards)
    for i, files in enumerate(reading.deal(source.files))
  ]
  for counts in run('reading', reading.read, parts):
    skipped.update(counts)
  if not spool.names(spooled):
    raise mistake(
      'corpus',
      f'{recipe.source!r} without a document (skipped: {dict(skipped)})',
      'one at least',
      'another --config.source or --config.text_column',
    )
  if not os.path.exists(os.path.join(work, tokenizers.CARD)):
    tokenizer = given or tokenizers.train_sentencepiece(
      _Sample(spooled, recipe.shards, TOKENIZER_BYTES), recipe.vocab_size
    )
    tokenizer.save(work)
  jobs = [
    shards.Shard(split, i, count, spooled, work, recipe.context)
    for split in (dataset.TRAIN, dataset.VALIDATION)
    for count in [shards.shard_count(split, recipe.validation_fraction, recipe.shards)]
    for i in range(count)
  ]
  made = list(run('packing', shards.make_shard, jobs))
  shards.finish(work, made, context=recipe.context, seed=recipe.seed, skipped=skipped, asked=asked)
  shutil.rmtree(spooled)


@dataclasses.dataclass(frozen=True)
class _Sample:
  """Training documents in seeded order, `most` bytes in all; validation is not looked at."""

  spooled: str
  count: int
  most: int

  def __iter__(self) -> Iterator[str]:
    most = self.most
    for i in range(self.count):
      for text in spool.Bucket(self.spooled, shards.bucket_name(dataset.TRAIN, i)):
        yield text[:most].decode(errors='ignore')  # a cut may fall inside a character
        most -= len(text)
        if most <= 0:
          return


def _given_tokenizer(tokenizer: str) -> tokenizers.Tokenizer:
  return tokenizers.Bytes() if tokenizer == 'bytes' else tokenizers.load(tokenizer)


def _hashed(source: sources.Source, run: Run) -> list[str]:
  """Hashes of the files, in the order of their parts."""
  return [d for ds in run('hashing', reading.hash_files, reading.deal(source.files)) for d in ds]


def _asked(
  recipe: Recipe, given: tokenizers.Tokenizer | None, digests: list[str]
) -> dict[str, object]:
  """All that decides the corpus's bytes: the recipe, and what the files hold."""
  asked = dataclasses.asdict(recipe) | {
    'tokenizer': given.identity if given else 'train',
    'files': f'{len(digests)} ({hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()})',
  }
  del asked['source']  # the same files may lie elsewhere
  if given:
    del asked['vocab_size']
  return asked


def _refuse_unlike(out: str, asked: dict[str, object]) -> None:
  try:
    differences = dataset.unlike(out, asked)
  except Mistake as e:
    got = f'{out!r}, which holds something else'
    raise mistake('out', got, 'a new or an empty folder', 'another --config.out') from e
  if differences:
    raise mistake(
      'out',
      f'{out!r}, which holds a corpus made differently ({"; ".join(differences)})',
      'a new folder',
      'another --config.out, or removing this one',
    )


if __name__ == '__main__':
  flags.run(main, __doc__)
