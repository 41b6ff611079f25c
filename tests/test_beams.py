"""Beam search finds what that of `transformers` finds."""

import numpy as np
import pytest

from gptjax import beams
from tests import small, their_models

SLOW = [
  pytest.param(*settings, marks=pytest.mark.slow)
  for settings in ((1, 0.6), (2, 1.0), (4, 0.0), (5, -1.0))
]


def upto(tokens, end):
  return tokens[: tokens.index(end)] if end in tokens else tokens


@pytest.mark.parametrize('width, penalty', [(4, 0.6), *SLOW])
@pytest.mark.parametrize('no_repeat', [pytest.param(0, marks=pytest.mark.slow), 2])
def test_beam_search_is_theirs(twins, width, penalty, no_repeat):
  model, ours = twins
  # The end is a token that they like, so that some beams end before others.
  greedy = {'max_new_tokens': 12, 'eos_token_id': None}
  likely = their_models.generate(model, their_models.PROMPTS, **greedy)[0]
  end = max(likely, key=likely.count)
  for stop in (end, 17):
    with small.on():
      made = small.decoder(ours, 2 * width)
      got = beams.search(made, their_models.PROMPTS, 12, penalty, no_repeat, stop)
    settings = {'num_beams': width, 'length_penalty': penalty, 'no_repeat_ngram_size': no_repeat}
    if width == 1:  # theirs is greedy then
      settings.pop('length_penalty')
    settings |= {'max_new_tokens': 12, 'eos_token_id': stop}
    want = their_models.generate(model, their_models.PROMPTS, **settings)
    assert [each[0][0] for each in got] == [upto(tokens, stop) for tokens in want]


def test_beams_are_scored_as_theirs(twins):
  model, ours = twins
  with small.on():
    got = beams.search(small.decoder(ours, 4), their_models.PROMPTS[:1], 8, 0.6, 0, 17)[0]
  want = their_models.generate(
    model,
    their_models.PROMPTS[:1],
    eos_token_id=17,
    max_new_tokens=8,
    num_beams=4,
    num_return_sequences=4,
    length_penalty=0.6,
    output_scores=True,
    return_dict_in_generate=True,
  )
  assert [text for text, _ in got] == [upto(t, 17) for t in want.sequences[:, 5:].tolist()]
  np.testing.assert_allclose([score for _, score in got], want.sequences_scores, rtol=1e-4)
