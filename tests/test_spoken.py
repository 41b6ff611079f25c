"""What is said piece by piece is what the tokens say, up to a stop."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data import tokenizer as tokenizers
from gptjax.spoken import Spoken
from tests.test_hf_tokenizer import KINDS, both  # noqa: F401

TOKENS = st.lists(st.integers(0, 255), max_size=30)


def said(tokenizer, tokens, stops=()):
  spoken = Spoken(tokenizer, stops)
  pieces = [spoken.add(token) for token in tokens]
  pieces.append(spoken.end('length'))
  assert ''.join(pieces) == spoken.text
  return spoken, pieces


@pytest.mark.parametrize('kind', KINDS)
@given(tokens=TOKENS)
def test_all_pieces_are_the_text(both, kind, tokens):  # noqa: F811
  tokenizer = both[kind][0]
  tokens = [token for token in tokens if token != tokenizer.end_of_text]
  spoken, _ = said(tokenizer, tokens)
  assert spoken.text == tokenizer.decode(tokens) and spoken.tokens == tokens


@pytest.mark.parametrize('kind', KINDS)
@given(text=st.text(st.characters(exclude_categories=('Cs',)), max_size=20))
def test_no_piece_has_half_a_character(both, kind, text):  # noqa: F811
  tokenizer = both[kind][0]
  _, pieces = said(tokenizer, tokenizer.encode(text).tolist())
  assert ''.join(pieces) == text
  assert not any('\ufffd' in piece for piece in pieces) or '\ufffd' in text


@given(text=st.text('ab\n', max_size=20), stops=st.lists(st.text('ab\n', min_size=1, max_size=4)))
def test_it_ends_before_the_first_stop(text, stops):
  tokenizer = tokenizers.Bytes()
  spoken, pieces = said(tokenizer, tokenizer.encode(text).tolist(), stops)
  ends = [at for at in (text.find(stop) for stop in stops) if at >= 0]
  # The first that is complete, as of two that overlap the one is seen whole before the other.
  if not ends:
    assert spoken.text == text and spoken.ended == 'length'
    return
  done = min(text.find(stop) + len(stop) for stop in stops if stop in text)
  first = min(at for at in (text[:done].find(stop) for stop in stops) if at >= 0)
  assert spoken.text == text[:first] and spoken.ended == 'stop'
  assert spoken.add(97) == '' and ''.join(pieces) == spoken.text


def test_an_end_of_text_ends_it():
  spoken, pieces = said(tokenizers.Bytes(), [104, 105, 256, 104])
  assert spoken.text == 'hi' and spoken.ended == 'end of text' and pieces[-1] == ''


def test_what_may_be_a_stop_is_said_when_it_is_none():
  _, pieces = said(tokenizers.Bytes(), [*b'a\nb\n'], ['\n\n'])
  assert pieces == ['a', '', '\nb', '', '\n']
