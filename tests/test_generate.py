"""The entry continues prompts with a trained model, and says plainly what it cannot do."""

import io
import json
import shutil

import jax
import numpy as np
import pytest

from gptjax import generate, trained
from gptjax.errors import Mistake
from tests import small, their_models

GREEDY = ('--temperature=0', '--tokens=12')


@pytest.fixture
def say(straight, capsys, monkeypatch):
  """What the entry prints, of the run that all tests have unless it is told another."""

  def said(*flags, stdin=None, model=f'--workdir={straight[0]}'):
    monkeypatch.setattr('sys.stdin', io.StringIO(stdin) if stdin is not None else Terminal())
    generate.main([model, *flags])
    return capsys.readouterr()

  return said


class Terminal(io.StringIO):
  """Where nobody types anything."""

  def isatty(self):
    return True


def test_the_program_continues_a_prompt(straight, run_python):
  flags = [f'--workdir={straight[0]}', '--prompt=def ', '--tokens=20']
  said = run_python(['-m', 'gptjax.generate', *flags], timeout=120).stdout
  assert said.startswith('def ') and len(said) > 5
  assert run_python(['-m', 'gptjax.generate', *flags], timeout=120).stdout == said


def test_greedy_is_what_the_trained_model_finds_likeliest(straight, say):
  run = trained.look(str(straight[0]))
  text = run.tokenizer()
  tokens = [text.end_of_text, *text.encode('def ')]
  with small.on():
    logits, params = jax.jit(run.program.logits), run.params()
    for _ in range(12):
      padded = np.zeros((1, 32), np.int32)
      padded[0, : len(tokens)] = tokens
      tokens.append(int(np.argmax(logits(params, padded)[0, len(tokens) - 1])))
  assert say('--prompt=def ', *GREEDY).out == text.decode(tokens) + '\n'


def test_flags_reach_what_is_drawn(say):
  plain = say('--prompt=def ', '--tokens=12').out
  assert say('--prompt=def ', '--tokens=12').out == plain
  assert say('--prompt=def ', '--tokens=12', '--seed=1').out != plain
  assert say('--prompt=def ', '--tokens=12', '--temperature=5').out != plain
  greedy = say('--prompt=def ', *GREEDY).out
  for narrow in ('--top-k=1', '--top-p=1e-6'):
    assert say('--prompt=def ', '--tokens=12', narrow).out == greedy
  unlike = say('--prompt=def ', *GREEDY, '--no-repeat=1').out
  assert len(set(unlike[4:].strip('\n'))) == len(unlike[4:].strip('\n'))
  assert say('--prompt=def ', *GREEDY, '--tensor=2').out == greedy


def test_it_ends_before_a_stop(say):
  whole = say('--prompt=def ', *GREEDY).out
  stop = whole[6:8]
  assert say('--prompt=def ', *GREEDY, f'--stop={stop}').out == whole[: whole.index(stop, 4)] + '\n'


def test_many_prompts_are_what_each_is_alone(say, tmp_path):
  prompts = ['def ', 'import os\nimport', 'x']
  (tmp_path / 'p.jsonl').write_text('\n'.join(map(json.dumps, prompts)))
  flags = (*GREEDY, '--json')
  together = say(f'--prompts={tmp_path}/p.jsonl', *flags, '--batch=2').out.splitlines()
  together = [json.loads(line) for line in together]
  assert [made['prompt'] for made in together] == prompts
  for prompt, made in zip(prompts, together, strict=True):
    assert say(f'--prompt={prompt}', *flags).out == json.dumps(made, ensure_ascii=False) + '\n'
    assert made['ended'] == 'length' and len(made['text']) > 0


def test_lines_of_a_file_and_standard_input_are_prompts(say, tmp_path):
  (tmp_path / 'p.txt').write_text('def \n\nclass\n')
  made = say(f'--prompts={tmp_path}/p.txt', *GREEDY, '--json').out.splitlines()
  assert [json.loads(line)['prompt'] for line in made] == ['def ', 'class']
  assert say(*GREEDY, stdin='def ').out == say('--prompt=def ', *GREEDY).out
  assert say(*GREEDY).out == say('--prompt=', *GREEDY).out


def test_only_line_feeds_end_a_prompt(say, tmp_path):
  prompts = ['a\u2028b', 'c\x0cd\x85']
  (tmp_path / 'p.txt').write_bytes('\r\n'.join(prompts).encode())
  lines = [json.dumps(prompt, ensure_ascii=False) for prompt in prompts]
  (tmp_path / 'p.jsonl').write_text('\n'.join(lines))
  for name in ('p.txt', 'p.jsonl'):
    made = say(f'--prompts={tmp_path}/{name}', *GREEDY, '--json').out.split('\n')[:-1]
    assert [json.loads(line)['prompt'] for line in made] == prompts


def test_a_prompt_that_is_no_text_ends_a_conversation_plainly(say):
  with pytest.raises(Mistake, match='prompt: got UnicodeEncodeError'):
    say('--interactive', *GREEDY, stdin='caf\udce9\n')


def test_where_all_tokens_came_before_they_come_again(say):
  made = say('--prompt=a', '--tokens=270', '--no-repeat=1', '--json', '--temperature=0').out
  assert json.loads(made)['ended'] in ('length', 'end of text')
  assert len(say('--prompt=a', '--tokens=270', '--no-repeat=1', '--json', '--beams=2').out) > 9


def test_continuations_differ_and_the_first_is_the_only_ones(say):
  flags = ('--prompt=def ', '--tokens=12', '--json')
  texts = [json.loads(line)['text'] for line in say(*flags, '--continuations=3').out.splitlines()]
  assert len(set(texts)) == 3
  assert [json.loads(say(*flags).out)['text']] == texts[:1]


def test_beams_come_best_first(say):
  flags = ('--prompt=def ', '--tokens=8', '--json', '--beams=4')
  made = [json.loads(line) for line in say(*flags, '--continuations=4').out.splitlines()]
  scores = [each['score'] for each in made]
  assert len(made) == 4 and scores == sorted(scores, reverse=True)
  assert json.loads(say(*flags).out) == made[0]
  assert '--- length, score' in say(*flags[:2], '--beams=2').out


def test_a_prompt_longer_than_the_context_is_told(say):
  assert 'the model sees its last 25 of 41 tokens' in say('--prompt=' + 'x' * 40, *GREEDY).err


def test_a_conversation(say):
  said = say('--interactive', *GREEDY, stdin='def \n\n')
  once = say('--prompt=def ', '--tokens=24', '--temperature=0').out.removesuffix('\n')
  more = once.removeprefix(say('--prompt=def ', *GREEDY).out.removesuffix('\n'))
  assert said.out == f'> {once[: -len(more)]}\n> {more}\n> \n'


def test_a_model_of_hugging_face(say, tmp_path, straight):
  """Its tokenizer is the bytes of a run, whose vocabulary is as large."""
  their_models.make('gpt2', vocab_size=257).save_pretrained(tmp_path)
  from gptjax import hf_tokenizer

  hf_tokenizer.save(tmp_path, trained.look(str(straight[0])).tokenizer(), 24)
  said = say('--prompt=abc', *GREEDY, model=f'--hf={tmp_path}').out
  assert said.startswith('abc') and len(said) > 4


@pytest.mark.parametrize(
  'flags, told',
  [
    (['--temperature=-1'], '--temperature: got -1.0, wanted a finite number'),
    (['--temperature=nan'], '--temperature: got nan'),
    (['--tokens=0'], '--tokens: got 0, wanted 1 to 1,000,000; try --tokens=100'),
    (['--top-p=0'], '--top-p: got 0.0'),
    (['--top-k=-1', '--no-repeat=-1'], '2 mistakes'),
    (['--beams=4', '--seed=1'], '--beams: got 4, wanted no temperature'),
    (['--length-penalty=1'], 'wanted beams, which it is for'),
    (
      ['--beams=2', '--length-penalty=1e6'],
      '--length-penalty: got 1000000.0, wanted a number from',
    ),
    (['--beams=100000000'], '--beams: got 100000000, wanted 1 to 4096'),
    (['--tokens=100000000000'], '--tokens: got 100000000000, wanted 1 to 1,000,000'),
    (['--prompts='], 'got IsADirectoryError'),
    (['--beams=4', '--temperature=1'], '--beams: got 4, wanted no temperature'),
    (['--beams=2', '--continuations=3'], '--continuations: got 3, wanted at most 2'),
    (['--interactive', '--json'], 'no beams, continuations or JSON with it'),
    (['--stop='], 'wanted some text'),
    (['--seed=-1'], 'seed: got -1'),
    (['--seed=1180591620717411303424'], 'seed: got'),
    (['--tensor=3'], '--tensor: got 3, .* try --tensor= one of 1, 2, 4$'),
    (['--tensor=99'], '--tensor: got 99, wanted 1 … 8'),
    (['--prompts=nowhere.txt'], 'nowhere.txt: got FileNotFoundError'),
    (['--prompt=caf\udce9'], 'prompt: got UnicodeEncodeError: .*, wanted UTF-8 text'),
  ],
)
def test_mistakes_are_told(say, flags, told):
  with pytest.raises(Mistake, match=told):
    say(*flags)


DEEP = '[' * 100_000


@pytest.mark.parametrize(
  'name, text', [('a.txt', ''), ('a.jsonl', '3'), ('a.jsonl', '{'), ('a.jsonl', DEEP)]
)
def test_a_file_of_no_prompts_is_told(say, tmp_path, name, text):
  (tmp_path / name).write_text(text)
  with pytest.raises(Mistake, match=name):
    say(f'--prompts={tmp_path / name}')


@pytest.mark.parametrize('text', ['', '{', '[]', '{}', '{"model": {"context": 8}}', '\xff'])
def test_a_damaged_config_of_the_run_is_told(say, tmp_path, text):
  (tmp_path / 'config.json').write_bytes(text.encode('latin-1'))
  with pytest.raises(Mistake):
    say('--prompt=a', model=f'--workdir={tmp_path}')


def test_a_config_that_is_not_of_this_run_is_told(say, straight, tmp_path):
  about = json.loads((straight[0] / 'config.json').read_text())
  shutil.copy(straight[0] / 'tokenizer.json', tmp_path)
  for knobs, told in (
    ({'vocab_size': 300}, 'got 257 tokens, wanted 300 tokens'),
    ({'n_layers': '2'}, 'config.json: got TypeError'),
  ):
    changed = about | {'model': about['model'] | knobs}
    (tmp_path / 'config.json').write_text(json.dumps(changed))
    with pytest.raises(Mistake, match=told):
      say('--prompt=a', model=f'--workdir={tmp_path}')


def test_a_program_that_was_told_nonsense_shows_no_traceback(run_python):
  done = run_python(['-m', 'gptjax.generate', '--workdir=nowhere'], timeout=120, code=2)
  assert 'nowhere' in done.stderr and 'Traceback' not in done.stderr
