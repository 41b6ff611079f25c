"""What a run says of its own held-out text, the entry says too; and of any other text."""

import dataclasses
import json
import math

import numpy as np
import pytest

from gptjax import evaluate, journal, trained
from gptjax.data import dataset
from gptjax.errors import Mistake
from tests import small


@pytest.fixture
def say(straight, capsys):
  def said(*flags, model=f'--workdir={straight[0]}'):
    evaluate.main([model, *flags])
    return capsys.readouterr().out

  return said


def test_held_out_windows_have_the_loss_that_training_found(say, straight, corpus):
  last = journal.timeless(straight[0], 'validation')[-1]
  made = json.loads(say(f'--data={corpus}', f'--limit={last["windows"]}', '--json'))
  assert made['texts'] == last['windows'] and made['tokens'] == 32 * last['windows']
  assert made['loss'] == pytest.approx(last['loss'], rel=1e-6)
  assert made['bits_per_byte'] == pytest.approx(last['bits_per_byte'], rel=1e-6)
  assert made['perplexity'] == pytest.approx(math.exp(last['loss']), rel=1e-6)


def test_a_text_is_scored_token_by_token(say, straight, tmp_path):
  """A document that fits one window, against the model's own logits."""
  text, out = 'def é(x):\n', tmp_path / 'log_probs.jsonl'
  (tmp_path / 'a.txt').write_text(text)
  made = json.loads(say(f'--text={tmp_path}/a.txt', f'--log-probs={out}', '--json'))
  run = trained.look(straight[0])
  token_t = np.array([256, *text.encode(), 256])
  with small.on():
    logits = np.asarray(run.program.logits(run.params(), token_t[None, :-1]))[0]
  log_p_tv = logits - np.logaddexp.reduce(logits, 1, keepdims=True)
  want = log_p_tv[np.arange(len(token_t) - 1), token_t[1:]]
  line = json.loads(out.read_text())
  np.testing.assert_allclose(line['log_probs'], want, atol=1e-4)
  assert line['tokens'] == token_t[1:].tolist() and line['pieces'][:3] == ['d', 'e', 'f']
  assert made['loss'] == pytest.approx(-want.mean(), abs=1e-5)
  assert made['bytes'] == len(text.encode())
  assert made['bits_per_byte'] == pytest.approx(-want.sum() / math.log(2) / made['bytes'], rel=1e-5)


def test_long_documents_are_read_through_a_window(say, tmp_path):
  lines = [{'text': 'x = 1\n' * 40}, {'text': 'y'}]
  (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  flags = (f'--text={tmp_path}/a.jsonl', '--json')
  half, none = (json.loads(say(*flags, f'--stride={stride}')) for stride in (16, 32))
  assert half['texts'] == 2 and half['tokens'] == 241 + 2
  assert json.loads(say(*flags)) == half
  assert half['loss'] != none['loss']
  assert json.loads(say(*flags, '--limit=1'))['texts'] == 1


def test_a_table_is_printed(say, tmp_path):
  (tmp_path / 'a.txt').write_text('def main():\n')
  said = say(f'--text={tmp_path}')
  assert [line.split()[0] for line in said.splitlines()] == [
    'documents', 'tokens', 'bytes', 'loss', 'perplexity', 'bits'
  ]  # fmt: skip


@pytest.mark.parametrize(
  'flags, told',
  [
    (['--stride=99'], '--stride: got 99, wanted at most 32'),
    (['--stride=-1', '--batch=0'], '2 mistakes'),
    (['--text=nowhere'], "corpus: got 'nowhere', which does not exist"),
    (['--data=nowhere'], 'nowhere'),
    (['--batch=200000000'], '--batch: got 200000000, wanted at most 4096'),
    (['--text='], 'what to score: got no text'),
    (['--log-probs=nowhere/a.jsonl'], 'nowhere/a.jsonl: got FileNotFoundError'),
    (['--log-probs=tests'], 'tests: got IsADirectoryError'),
  ],
)
def test_mistakes_are_told(say, flags, told, tmp_path):
  (tmp_path / 'a.txt').write_text('x')
  more = [] if flags[0][:6] in ('--text', '--data') else [f'--text={tmp_path}']
  with pytest.raises(Mistake, match=told):
    say(*more, *flags)


def test_a_corpus_of_another_tokenizer_is_refused(say, corpus, monkeypatch):
  real = dataset.describe(corpus)
  monkeypatch.setattr(dataset, 'describe', lambda _: dataclasses.replace(real, tokenizer='x'))
  with pytest.raises(Mistake, match='another tokenizer than the model has'):
    say(f'--data={corpus}')


def test_what_is_there_stays_until_all_is_scored(say, tmp_path):
  told, text = tmp_path / 'told.jsonl', tmp_path / 'a.txt'
  told.write_text('before')
  text.write_text('def main')
  with pytest.raises(Mistake, match='nowhere'):
    say('--text=nowhere', f'--log-probs={told}')
  with pytest.raises(Mistake, match='a file that is not scored'):
    say(f'--text={text}', f'--log-probs={text}')
  assert told.read_text() == 'before' and text.read_text() == 'def main'
  say(f'--text={text}', f'--log-probs={told}')
  assert json.loads(told.read_text())['pieces'][0] == 'd'
