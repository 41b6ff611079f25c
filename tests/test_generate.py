"""A sample is what the model's own logits say, and the entry speaks with a trained model."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest

from configs import generate as configs
from gptjax import generate
from gptjax.errors import Mistake
from tests import small

END = 249


def sample(program, params, prompt, count, temperature, seed=0, end=END):
  with small.on():
    return generate.sample(program, params, prompt, count, temperature, seed, end)


@pytest.fixture(scope='module')
def loud():
  """A model with opinions: ten times the weights that training starts from."""
  program = small.program()
  with small.on():
    return program, jax.tree.map(lambda a: 10 * a, small.init(program)['params'])


def test_greedy_takes_the_likeliest_token_past_the_end_of_the_context(loud):
  program, params = loud
  T = program.shape.context
  tokens = [3, 1, 4]
  got = sample(program, params, tokens, T + 5, temperature=0.0, end=-1)
  with small.on():
    logits = jax.jit(program.logits)
    for _ in range(T + 5):
      recent = np.asarray([tokens[-T:]])
      tokens.append(int(np.argmax(logits(params, recent)[0, -1])))
  assert got == tokens[3:]


def test_seed_decides_and_padding_is_never_drawn(loud):
  program, params = loud
  draw = lambda seed: sample(program, params, [5], 30, 5.0, seed, end=-1)
  hottest = sample(program, params, [5], 30, 1e300, end=-1)
  assert len(set(hottest)) > 20 and max(hottest) < program.shape.vocab_size
  assert draw(0) == draw(0) != draw(1)
  assert max(draw(0) + draw(1)) < program.shape.vocab_size


def test_end_of_text_ends_it(loud):
  program, params = loud
  whole = sample(program, params, [5], 10, 1.0, end=-1)
  assert sample(program, params, [5], 10, 1.0, end=whole[4]) == whole[: whole.index(whole[4])]


def test_temperature_is_the_distributions(loud):
  program, params = loud
  program = dataclasses.replace(program)
  with small.on():
    logit_v = np.asarray(jax.jit(program.logits)(params, np.asarray([[7]])))[0, -1]
  likely = int(np.argmax(logit_v))
  p = np.exp(logit_v / 2 - np.logaddexp.reduce(logit_v / 2))
  draws = [sample(program, params, [7], 1, 2.0, seed, end=-1)[0] for seed in range(60)]
  share = draws.count(likely) / 60
  assert abs(share - p[likely]) < 4 * np.sqrt(p[likely] * (1 - p[likely]) / 60) + 1e-9


def test_entry_continues_a_prompt_with_a_trained_model(straight, run_python):
  workdir, _ = straight
  flags = [f'--config.workdir={workdir}', '--config.prompt=def ', '--config.tokens=20']
  command = ['-m', 'gptjax.generate', '--config=configs/generate.py', *flags]
  said = run_python(command, timeout=120).stdout
  assert said.startswith('def ') and len(said) > 5
  assert run_python(command, timeout=120).stdout == said


def entry_config(workdir, **knobs):
  config = configs.get_config()
  config.update({'workdir': str(workdir)} | knobs)
  return config


def test_entry_passes_on_what_it_was_told(straight, monkeypatch, capsys):
  workdir, _ = straight
  asked = []

  def sampled(*args):
    asked.append(args[2:])
    return [104, 105]

  monkeypatch.setattr(generate, 'sample', sampled)
  knobs = {'prompt': 'ab', 'tokens': 9, 'temperature': 0.5, 'seed': 4}
  generate.main(entry_config(workdir, **knobs))
  end = 256
  assert asked == [([end, 97, 98], 9, 0.5, 4, end)]
  assert capsys.readouterr() == ('abhi\n', '')
  generate.main(entry_config(workdir, prompt='x' * 40))
  told = 'the model sees the last 32 of its 41 tokens'
  assert told in capsys.readouterr().err


def test_temperature_and_seed_reach_the_sample(straight, capsys):
  workdir, _ = straight

  def said(**knobs):
    generate.main(entry_config(workdir, prompt='def ', tokens=12, **knobs))
    return capsys.readouterr().out

  assert said(temperature=0.0, seed=0) == said(temperature=0.0, seed=1)
  assert said(temperature=5.0, seed=0) != said(temperature=5.0, seed=1)


@pytest.mark.parametrize(
  'knobs, told',
  [
    ({'workdir': 'nowhere'}, 'workdir: got nowhere, without .*, wanted the workdir of a run'),
    ({'temperature': -1.0}, 'temperature -1.0'),
    ({'temperature': math.nan}, 'temperature nan'),
    ({'temperature': math.inf}, 'temperature inf'),
    ({'tokens': 0}, 'tokens 0'),
    ({'seed': -1}, 'seed: got -1'),
    ({'seed': 2**70}, 'seed: got'),
    ({'workdir': 's3://bucket/run'}, 'got s3://bucket/run, wanted one of this machine, or gs://'),
    ({'prompt': 'caf\udce9'}, 'prompt: got UnicodeEncodeError: .*, wanted UTF-8 text'),
  ],
)
def test_mistakes_are_told(straight, knobs, told):
  with pytest.raises(Mistake, match=told):
    generate.main(entry_config(**{'workdir': straight[0]} | knobs))


@pytest.mark.parametrize('text', ['', '{', '[]', '{}', '{"model": {"context": 8}}', '\xff'])
def test_a_damaged_config_of_the_run_is_told(tmp_path, text):
  (tmp_path / 'config.json').write_bytes(text.encode('latin-1'))
  with pytest.raises(Mistake):
    generate.main(entry_config(tmp_path))


def test_a_config_that_is_not_of_this_run_is_told(straight, tmp_path):
  trained = json.loads((straight[0] / 'config.json').read_text())
  shutil.copy(straight[0] / 'tokenizer.json', tmp_path)
  for knobs, told in (
    ({'vocab_size': 300}, 'got 257 tokens, wanted 300 tokens'),
    ({'n_layers': '2'}, 'config.json: got TypeError'),
  ):
    changed = trained | {'model': trained['model'] | knobs}
    (tmp_path / 'config.json').write_text(json.dumps(changed))
    with pytest.raises(Mistake, match=told):
      generate.main(entry_config(tmp_path))


def test_a_program_that_was_told_nonsense_shows_no_traceback(run_python):
  command = ['-m', 'gptjax.generate', '--config=configs/generate.py', '--config.workdir=nowhere']
  done = run_python(command, timeout=120, code=2)
  assert 'nowhere' in done.stderr and 'Traceback' not in done.stderr


def test_config_of_another_program_is_told(run_python):
  done = run_python(['-m', 'gptjax.generate', '--config=configs/corpus.py'], timeout=120, code=2)
  assert 'configs/corpus.py, which lacks what' in done.stderr and 'Traceback' not in done.stderr
