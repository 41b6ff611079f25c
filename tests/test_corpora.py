"""Corpora that belong together, and those that do not."""

import argparse
import json
import re

import pytest

from gptjax.data import corpora, dataset
from gptjax.errors import Mistake
from gptjax.sizes import Shape
from tests.runs import CONTEXT, make_corpus

SHAPE = Shape(2, 8, 1, 8, 32, CONTEXT, 257, (None,))


@pytest.fixture(scope='module')
def more(tmp_path_factory):
  return make_corpus(tmp_path_factory.mktemp('more') / 'x', [argparse, json])


def renamed(folder, name, tmp_path):
  (tmp_path / name).symlink_to(folder)
  return str(tmp_path / name)


def test_shares_are_of_contents_wherever_they_lie(corpus, more, tmp_path):
  more = renamed(more, 'more', tmp_path)
  opened = corpora.open_all(f'{corpus}=3,{more}', SHAPE)
  assert opened.stage == {dataset.describe(corpus).digest: 3, dataset.describe(more).digest: 1}
  elsewhere = renamed(corpus, 'elsewhere', tmp_path)
  same = corpora.open_all(f'{more}=0.5,{elsewhere}=1.5', SHAPE)
  assert same.stage == opened.stage
  # Told by the names that they had.
  assert same.identity(opened.names) == opened.identity({}) != same.identity({})
  assert re.fullmatch(r'more 1/4 \([\da-f]{16}\), prepared 3/4 .*', opened.identity({})['sources'])


def test_a_source_of_weight_0_is_only_validated(corpus, more, tmp_path):
  opened = corpora.open_all(f'{corpus},{renamed(more, "more", tmp_path)}=0', SHAPE)
  assert [*opened.stage] == [dataset.describe(corpus).digest]
  assert len(opened.held_out) == 2
  assert opened.mean(dict.fromkeys(opened.by_name, 2.0)) == 2
  losses = {name: 1.0 if weight else 9.0 for name, weight in opened.weights.items()}
  assert opened.mean(losses) == 1


def test_bits_per_byte_of_one_corpus_are_its_own(corpus):
  opened = corpora.open_all(corpus, SHAPE)
  (name,) = opened.by_name
  wanted = dataset.bits_per_byte(2.0, opened.first.validation)
  assert opened.bits_per_byte({name: 2.0}) == pytest.approx(wanted)


def test_everything_wrong_is_told_at_once(corpus, more, tmp_path):
  model = Shape(2, 8, 1, 8, 32, 2 * CONTEXT, 300, (None,))
  with pytest.raises(Mistake, match='3 mistakes') as e:
    corpora.open_all(f'{corpus},nowhere', model)
  assert 'context of the windows' in str(e.value) and "'nowhere', which does not" in str(e.value)
  assert '--config.model.vocab_size=257' in str(e.value)


def test_corpora_of_different_tokenizers_are_refused(corpus, tmp_path):
  other = make_corpus(tmp_path / 'x', tokenizer='train', vocab_size=600)
  other = renamed(other, 'other', tmp_path)
  model = Shape(2, 8, 1, 8, 32, CONTEXT, 600, (None,))
  with pytest.raises(Mistake, match='vocabulary of the tokenizer'):
    corpora.open_all(f'{other},{corpus}', model)
  opened = corpora.Corpora(
    {'a': dataset.describe(corpus), 'b': dataset.describe(other)}, {'a': 0.5, 'b': 0.5}
  )
  told = [str(m) for m in corpora._unlike(opened)]
  assert len(told) == 1 and f'preparing it with --config.tokenizer={corpus}' in told[0]


@pytest.mark.parametrize('knobs', [{'seed': 1}, {'validation_fraction': 0.2}])
def test_corpora_that_hold_out_otherwise_are_refused(corpus, tmp_path, knobs):
  """The same documents in both would be held out of one and trained on in the other."""
  other = renamed(make_corpus(tmp_path / 'x', **knobs), 'other', tmp_path)
  with pytest.raises(Mistake, match='what is held out of .*other: got chosen by seed'):
    corpora.open_all(f'{corpus},{other}', SHAPE)


def test_shares_are_exact_whatever_the_weights(corpus, more, tmp_path):
  more = renamed(more, 'more', tmp_path)
  stage = lambda *weights: [
    *corpora.open_all(f'{corpus}={weights[0]},{more}={weights[1]}', SHAPE).stage.values()
  ]
  assert sorted(stage(60, 41)) == [41, 60]
  assert sorted(stage(0.1, 0.3)) == [1, 3]
  assert stage(1e308, 1e308) == [1, 1]
  assert corpora.open_all(f'{corpus}=1e308,{more}=1e308', SHAPE).weights[more[-4:]] == 0.5


def test_the_same_corpus_twice_is_refused(corpus, tmp_path):
  with pytest.raises(Mistake, match='the same windows as'):
    corpora.open_all(f'{corpus},{renamed(corpus, "again", tmp_path)}', SHAPE)
