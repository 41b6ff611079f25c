"""Which source each sequence comes from: exact shares, at any index, by arithmetic alone."""

import dataclasses
import fractions
import math
from collections.abc import Mapping, Sequence

from gptjax.errors import mistake, raise_all


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stretch of the stream with the same sources and weights."""

  start: int  # sequences consumed where it begins
  weights: Mapping[str, float]  # of each source, by its name; they need not sum to 1


class Mixture:
  """Stages of sources. Sequence i is `locate(i)`: a source, and how many came from it before.

  A source goes on in a later stage where it stopped in an earlier one, so that nothing of it is
  lost or comes twice before its epoch ends. After any number of sequences each source has had its
  share of a stage to within less than the number of its sources.
  """

  def __init__(self, stages: Sequence[Stage]):
    starts = [stage.start for stage in stages]
    assert starts[0] == 0 and starts == sorted(set(starts)), starts
    self.stages = tuple(stages)
    self._shares = [shares(stage.weights) for stage in stages]
    # What each source has given before each stage.
    self._before = [{}]
    for i in range(1, len(stages)):
      self._before.append(self.counts(starts[i]))

  def counts(self, sequences: int) -> dict[str, int]:
    """How many of the first `sequences` come from each source."""
    i = self._stage(sequences - 1)
    counts = dict(self._before[i])
    for name, count in _split(sequences - self.stages[i].start, self._shares[i]).items():
      counts[name] = counts.get(name, 0) + count
    return counts

  def locate(self, index: int) -> tuple[str, int]:
    """The source of a sequence, and its index in the stream of that source."""
    i = self._stage(index)
    n, shares, before = index - self.stages[i].start, self._shares[i], self._before[i]
    had, has = _split(n, shares), _split(n + 1, shares)
    name = next(name for name in shares if has[name] > had[name])
    return name, before.get(name, 0) + had[name]

  def _stage(self, index: int) -> int:
    # Few stages, and the last is the one that is asked for.
    return max((i for i, stage in enumerate(self.stages) if stage.start <= index), default=0)


def parse(text: str) -> dict[str, float]:
  """`folder=weight,…` as weights by folder; a folder without a weight has 1.

  Raises:
    Mistake: with everything that is wrong with it, at once.
  """
  weights, mistakes = {}, []
  what, fix = 'data.sources', "--config.data.sources='data/web=60,data/books=40'"
  for part in filter(None, map(str.strip, text.split(','))):
    folder, _, weight = part.partition('=')
    try:
      value = float(weight or 1)
    except ValueError:
      value = math.nan
    if not 0 <= value < math.inf:
      mistakes.append(mistake(what, part, 'a weight that is finite and not negative', fix))
    if name_of(folder) in map(name_of, weights):
      got = f'two sources named {name_of(folder)}'
      mistakes.append(mistake(what, got, 'folders of different names', 'leaving one out'))
    weights[folder.strip().rstrip('/')] = value
  if not mistakes and not any(weights.values()):
    got = repr(text) if text else 'none'
    mistakes.append(mistake(what, got, 'one source at least with a weight above 0', fix))
  raise_all(mistakes)
  return weights


def name_of(folder: str) -> str:
  """What a source is called in checkpoints and metrics, wherever its folder lies."""
  return folder.strip().rstrip('/').rsplit('/', 1)[-1]


def shares(weights: Mapping[str, float]) -> dict[str, int]:
  """Weights as the smallest integers in the same ratio, by name; a weight of 0 has none."""
  # By its shortest decimal: 0.1 is a tenth, and not the binary fraction next to it. Sorted, so that
  # the order in which sources are written does not matter.
  exact = {name: fractions.Fraction(repr(w)) for name, w in sorted(weights.items()) if w}
  scale = math.lcm(*(w.denominator for w in exact.values()))
  integers = {name: int(w * scale) for name, w in exact.items()}
  common = math.gcd(*integers.values())
  return {name: n // common for name, n in integers.items()}


def _split(n: int, shares: Mapping[str, int]) -> dict[str, int]:
  """n divided by shares, so that n + 1 gives one of them one more and the others the same."""
  # The first takes its share of n, the second its share of what is left, and so on: a whole part
  # of n never shrinks as n grows, nor grows by more than one, and neither does what it leaves.
  counts, left, of = {}, n, sum(shares.values())
  for name, share in shares.items():
    counts[name] = left * share // of
    left, of = left - counts[name], of - share
  return counts
