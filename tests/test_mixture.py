"""Shares are exact at every index, and no source loses or repeats a sequence."""

import fractions

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data.mixture import Mixture, Stage, parse
from gptjax.errors import Mistake

weights = st.dictionaries(
  st.sampled_from('abcdef'), st.floats(0, 100).map(lambda w: round(w, 3)), min_size=1
).filter(lambda d: any(d.values()))
mixtures = st.lists(st.tuples(st.integers(1, 50), weights), min_size=1, max_size=4).map(
  lambda stages: Mixture(
    [
      Stage(sum(length for length, _ in stages[:i]), weights)
      for i, (_, weights) in enumerate(stages)
    ]
  )
)


@given(mixtures)
def test_walk_takes_each_source_in_order_and_counts_say_so(mixture):
  """Through all stages: nothing lost, nothing twice, whatever the weights change to."""
  seen = {}
  for i in range(300):
    assert {k: n for k, n in mixture.counts(i).items() if n} == seen
    name, index = mixture.locate(i)
    assert index == seen.get(name, 0)
    seen[name] = index + 1


@given(weights, st.integers(0, 10**15))
def test_shares_are_exact_at_any_index(weights, n):
  counts = Mixture([Stage(0, weights)]).counts(n)
  total = sum(fractions.Fraction(repr(w)) for w in weights.values())
  assert sum(counts.values()) == n
  for name, weight in weights.items():
    share = n * fractions.Fraction(repr(weight)) / total
    assert abs(counts.get(name, 0) - share) < len(weights)


def test_a_tenth_is_a_tenth():
  counts = Mixture([Stage(0, {'a': 0.1, 'b': 0.7, 'c': 0.2})]).counts(10**12)
  assert counts == {'a': 10**11, 'b': 7 * 10**11, 'c': 2 * 10**11}


def test_sources_are_interleaved_and_not_in_runs():
  mixture = Mixture([Stage(0, {'a': 3, 'b': 1})])
  names = ''.join(mixture.locate(i)[0] for i in range(40))
  assert all(names[i : i + 4].count('b') == 1 for i in range(37))


def test_the_order_in_which_sources_are_written_does_not_matter():
  one, other = (Mixture([Stage(0, dict(w))]) for w in ([('a', 3), ('b', 1)], [('b', 1), ('a', 3)]))
  assert [one.locate(i) for i in range(9)] == [other.locate(i) for i in range(9)]


def test_text_of_a_mixture():
  assert parse('data/web=60, data/books = 40 ,x/') == {'data/web': 60, 'data/books': 40, 'x': 1}


@pytest.mark.parametrize(
  'text, told',
  [
    ('', 'got none'),
    ('a=0,b=0', 'one source at least with a weight above 0'),
    ('a=-1', 'got a=-1, wanted a weight that is finite and not negative'),
    ('a=x', 'got a=x'),
    ('a=inf', 'got a=inf'),
    ('a=nan,b=-2', '2 mistakes'),
    ('x/a=1,y/a=2', 'two sources named a'),
    ('a=1,a=2', 'two sources named a'),
  ],
)
def test_what_is_wrong_with_a_mixture_is_told(text, told):
  with pytest.raises(Mistake, match=told):
    parse(text)
