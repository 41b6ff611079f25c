"""The prepared corpora of a run: their shares of the stream, and what is held out of each."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping

from gptjax.data import dataset, loader, mixture
from gptjax.errors import Mistake, mistake, raise_all
from gptjax.sizes import Shape


@dataclasses.dataclass(frozen=True)
class Corpora:
  """Corpora by their names, that is the last parts of their folders' paths."""

  by_name: Mapping[str, dataset.Corpus]
  given: Mapping[str, float]  # weights by name, as they were asked for

  @property
  def first(self) -> dataset.Corpus:
    """One of them: all have its context and its tokenizer."""
    return next(iter(self.by_name.values()))

  @functools.cached_property
  def weights(self) -> dict[str, float]:
    """By name; they sum to 1."""
    shares = mixture.shares(self.given)
    return {name: shares.get(name, 0) / sum(shares.values()) for name in self.by_name}

  @property
  def stage(self) -> dict[str, int]:
    """Their shares of the stream, each by the hash of its contents: a folder may move."""
    digests = {corpus.digest: self.given[name] for name, corpus in self.by_name.items()}
    return mixture.shares(digests)

  @property
  def names(self) -> dict[str, str]:
    """By the hash of their contents."""
    return {corpus.digest: name for name, corpus in self.by_name.items()}

  def identity(self, names: Mapping[str, str]) -> dict:
    """What a checkpoint knows of them, their shares with the names that they had before."""
    total = sum(self.stage.values())
    shares = sorted((names.get(d, self.names[d]), n, d) for d, n in self.stage.items())
    told = ', '.join(f'{name} {n}/{total} ({digest[:16]})' for name, n, digest in shares)
    return {'tokenizer': self.first.tokenizer, 'context': self.first.context, 'sources': told}

  def stream(self, mixed: mixture.Mixture, seed: int) -> loader.Stream:
    """The windows to train on."""
    windows = {
      corpus.digest: dataset.windows(corpus, dataset.TRAIN)
      for name, corpus in self.by_name.items()
      if self.weights[name]
    }
    return loader.Stream(windows, mixed, seed)

  @functools.cached_property
  def held_out(self) -> dict[str, dataset.Windows]:
    """The windows to validate on, by name."""
    return {
      name: dataset.windows(corpus, dataset.VALIDATION) for name, corpus in self.by_name.items()
    }

  def mean(self, values: Mapping[str, float]) -> float:
    """A value of each, weighted as the corpora are."""
    return sum(self.weights[name] * value for name, value in values.items())

  @property
  def unigram_nats(self) -> dict[str, float]:
    """What a unigram model of each reaches on what is held out of it, by name."""
    return {name: corpus.unigram_nats for name, corpus in self.by_name.items()}

  def bits_per_byte(self, nats: Mapping[str, float]) -> float:
    """Losses in nats per token of each as bits per byte of their mixed text."""
    bytes_per_token = {name: self.by_name[name].validation.bytes_per_token for name in nats}
    return self.mean(nats) / math.log(2) / self.mean(bytes_per_token)

  def table(self, mixed: mixture.Mixture, total: int) -> list[str]:
    """A line for each: its share, its windows, and its epochs in a run of `total` sequences."""
    seen = mixed.counts(total)
    return [
      f'{corpus.folder}: {self.weights[name]:.2%} of the stream, {corpus.train.windows:,} windows, '
      f'{seen.get(corpus.digest, 0) / corpus.train.windows:,.2f} epochs'
      for name, corpus in self.by_name.items()
    ]


def open_all(sources: str, shape: Shape) -> Corpora:
  """The corpora of `folder=weight,…`, checked against each other and a model.

  Raises:
    Mistake: with everything that is wrong with them, at once.
  """
  weights = mixture.parse(sources)
  by_name, mistakes = {}, []
  for folder in weights:
    try:
      by_name[mixture.name_of(folder)] = corpus = dataset.describe(folder)
      check(shape, corpus)
    except Mistake as e:
      mistakes.append(e)
  raise_all(mistakes)
  opened = Corpora(by_name, {mixture.name_of(folder): w for folder, w in weights.items()})
  raise_all([*_unlike(opened)])
  return opened


def check(shape: Shape, corpus: dataset.Corpus) -> None:
  """Raises if a corpus is not what a model was configured for."""
  mistakes = []
  context, vocab_size, folder = corpus.context, corpus.vocab_size, corpus.folder
  if context != shape.context:
    fix = f'--config.model.context={context}, or prepare with --config.context={shape.context}'
    what = f'context of the windows in {folder}'
    mistakes.append(mistake(what, context, f'{shape.context}, as model.context', fix))
  if vocab_size != shape.vocab_size:
    fix = f'--config.model.vocab_size={vocab_size}, or another tokenizer'
    what = f'vocabulary of the tokenizer of {folder}'
    mistakes.append(mistake(what, vocab_size, f'{shape.vocab_size}, as model.vocab_size', fix))
  raise_all(mistakes)


def _unlike(opened: Corpora) -> Iterator[Mistake]:
  seen = {}
  for corpus in opened.by_name.values():
    if corpus.tokenizer != opened.first.tokenizer:
      yield mistake(
        f'tokenizer of {corpus.folder}',
        corpus.tokenizer[:12],
        f'{opened.first.tokenizer[:12]}, as that of {opened.first.folder}',
        f'preparing it with --config.tokenizer={opened.first.folder}',
      )
    # A document that lies in both would be held out of one and trained on in the other.
    held_out = lambda c: f'seed {c.seed} and validation_fraction {c.validation_fraction}'
    if held_out(corpus) != held_out(opened.first):
      yield mistake(
        f'what is held out of {corpus.folder}',
        f'chosen by {held_out(corpus)}',
        f'{held_out(opened.first)}, as for {opened.first.folder}',
        'preparing it with those',
      )
    if corpus.digest in seen:
      got = f'the same windows as {seen[corpus.digest]}'
      yield mistake(f'source {corpus.folder}', got, 'others', 'leaving one out')
    seen[corpus.digest] = corpus.folder
