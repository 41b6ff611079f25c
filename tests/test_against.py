"""The comparison with PyTorch's step: what it makes of the figures, and of contenders that fail."""

import argparse
import dataclasses
import io
import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import against, contender
from gptjax.errors import Mistake
from tests import runs, small

SHAPE = small.SHAPE
H100 = 'NVIDIA H100 80GB HBM3'


def row(seconds, product=1e12, kind='cpu', each=2, loss=5.5):
  return {
    'each': each,
    'seconds': seconds,
    'product': product,
    'kind': kind,
    'first_loss': loss,
    'peak_bytes': 3 * 10**9,
  }


def scripted(monkeypatch, program):
  """Has a worker run this instead, which finds its job in `job`, and answers by `say`."""
  head = 'import json, sys\njob = json.loads(input())\nsay = lambda **a: print(json.dumps(a))\n'
  real = against.subprocess.Popen
  command = [sys.executable, '-uc', head + program]
  popen = lambda _, **settings: real(command, **settings)  # noqa: E731
  monkeypatch.setattr(against.subprocess, 'Popen', popen)


@pytest.fixture
def race(tmp_path):
  race = against.Race.__new__(against.Race)
  race.folder, race.words, race.shape = tmp_path, ['--config=c'], SHAPE
  race.platform, race.kind = 'gpu', H100
  return race


# Figures.


def test_a_row_has_rates_shares_and_ours_beside_theirs():
  rows = {
    'ours-f32': row(2.0, 1e9),
    'torch-eager-f32': row(4.0, 2e9),
    'ours-bf16': row(1.0, 3e9, H100),
    'torch-compiled-bf16': row(1.0, 1e9, H100, each=4),
  }
  found = against.judged(rows, SHAPE, slices=3)
  tokens = 3 * 2 * SHAPE.context / 2.0
  ours = found['ours-f32']
  assert ours['rows'] == 6 and ours['tokens_per_second'] == tokens
  assert ours['flops'] == pytest.approx(tokens * SHAPE.train_flops)
  assert ours['of_product'] == pytest.approx(ours['flops'] / 2e9)  # of the faster of both
  assert ours['ours_over_theirs'] is None and ours['mfu'] is None
  assert found['torch-eager-f32']['ours_over_theirs'] == pytest.approx(2.0)
  assert found['torch-compiled-bf16']['ours_over_theirs'] == pytest.approx(0.5)
  bf16 = found['ours-bf16']
  assert bf16['of_product'] == pytest.approx(bf16['flops'] / 3e9)
  assert bf16['mfu'] == pytest.approx(bf16['flops'] / 989.4e12)


def test_the_table_has_a_line_for_each_and_says_why_one_failed():
  rows = {
    'ours-f32': row(2.0),
    'torch-eager-f32': row(4.0),
    'torch-compiled-f32': {'each': 2, 'failed': 'lacks', 'told': 'no compiler'},
  }
  head, ours, eager, compiled = against.table(against.judged(rows, SHAPE, 1)).splitlines()
  assert 'tokens/s' in head
  assert ours.split()[:4] == ['ours-f32', '2', '2', '16']
  assert eager.endswith('2.00 ×') and '3.00' in eager
  assert compiled.endswith('lacks: no compiler')


def test_losses_that_differ_are_told_by_what_they_are_computed_in():
  rows = {'ours-f32': row(1, loss=5.0), 'torch-eager-f32': row(1, loss=5.00004)}
  assert against.disagreeing(rows) == []
  rows['torch-eager-f32']['first_loss'] = 5.0001
  assert against.disagreeing(rows) == ['torch-eager-f32 5.000100 beside ours-f32 5.000000']
  rows['torch-eager-f32']['first_loss'] = float('nan')
  assert len(against.disagreeing(rows)) == 1
  rows = {'ours-bf16': row(1, loss=5.0), 'torch-compiled-bf16': row(1, loss=5.02)}
  assert against.disagreeing(rows) == []
  rows['torch-compiled-bf16']['first_loss'] = 5.03
  assert len(against.disagreeing(rows)) == 1
  assert against.disagreeing({'ours-f32': {'each': 1, 'failed': 'memory'}}) == []


def test_contenders_are_known_and_there(monkeypatch):
  assert against.chosen('ours-f32,torch-eager-f32') == ['ours-f32', 'torch-eager-f32']
  assert against.chosen('') == []
  for wrong in ('ours', 'ours-f32,', 'ours-f32,ours-f32'):
    with pytest.raises(Mistake, match='--contenders: got .*, wanted some of ours-f32,'):
      against.chosen(wrong)
  monkeypatch.setattr(against.importlib.util, 'find_spec', lambda name: None)
  against.check_installed(['ours-f32'])
  for names in ([], ['torch-eager-f32']):
    with pytest.raises(Mistake, match='torch is not installed; try pip install'):
      against.check_installed(names)


@pytest.mark.parametrize('words, told', [
  ('benchmarks/train_step.py --against=torch', 'error: --against: got a script'),
  ('-m benchmarks.train_step --against=torch --contenders=mine', "--contenders: got mine"),
  ('-m benchmarks.train_step --halve', '--halve and --json want --against=torch'),
  ('-m benchmarks.train_step --against=torch --dtype=bfloat16', 'instead of --dtype'),
])  # fmt: skip
def test_wrong_options_of_the_benchmark_are_told(run_python, words, told):
  done = run_python(words.split(), timeout=100, code=2)
  assert told in done.stderr and 'Traceback' not in done.stderr


# Processes.


STEPS = """
say(kind='cpu', version='1', product=1e9)
for line in sys.stdin:
  n = int(line)
  say(seconds=job['each'] / 8, losses=[5.5 - i for i in range(n)], peak_bytes=7)
"""


def test_contenders_take_turns(race, monkeypatch):
  scripted(monkeypatch, STEPS)
  monkeypatch.setattr(against, 'REST', 0.0)
  asked = []
  real = against.Worker.steps
  said = lambda worker, count: (asked.append((worker._log.stem, count)), real(worker, count))[1]
  monkeypatch.setattr(against.Worker, 'steps', said)
  rows = against.in_turns(race, ['ours-f32', 'torch-eager-f32'], each=4, repeats=2)
  warm = [('ours-f32', against.WARM), ('torch-eager-f32', against.WARM)]
  assert asked == warm + 2 * [('ours-f32', 1), ('torch-eager-f32', 1)]
  assert rows['ours-f32'].items() >= {'each': 4, 'seconds': 0.5, 'peak_bytes': 7}.items()
  assert rows['ours-f32']['first_loss'] == 5.5


FULL = """
if job['each'] > 2:
  say(failed='memory', told='not so many')
  sys.exit(1)
"""


def test_rows_are_halved_until_they_fit(race, monkeypatch, capsys):
  scripted(monkeypatch, FULL + STEPS)
  found = against.alone(race, 'ours-bf16', each=8, repeats=2, steps=3, halve=True)
  assert found['each'] == 2 and found['all_seconds'] == [0.25, 0.25]
  told = capsys.readouterr().out
  assert '8 rows are too many, 4 are tried' in told and '4 rows are too many, 2' in told
  found = against.alone(race, 'ours-bf16', each=8, repeats=2, steps=3, halve=False)
  assert found == {'each': 8, 'failed': 'memory', 'told': 'not so many'}


@pytest.mark.parametrize('program, kind, told', [
  ("sys.exit('of what it died')", 'ended', 'ended with code 1: of what it died'),
  ('import os, signal\nos.kill(os.getpid(), signal.SIGKILL)', 'memory', 'ended with code -9'),
  ("say(failed='lacks', told='no torch')", 'lacks', 'no torch'),
])  # fmt: skip
def test_one_that_fails_leaves_the_others(race, monkeypatch, program, kind, told):
  monkeypatch.setattr(against, 'REST', 0.0)
  scripted(monkeypatch, f"if job['who'] == 'torch':\n  exec({program!r})\n  sys.exit(1)\n{STEPS}")
  rows = against.in_turns(race, ['torch-eager-f32', 'ours-f32'], each=4, repeats=1)
  assert rows['torch-eager-f32'] == {'each': 4, 'failed': kind, 'told': told}
  assert rows['ours-f32']['seconds'] == 0.5


def test_what_is_short_of_memory_is_told_from_what_is_wrong():
  full = [
    MemoryError('CUDA out of memory. Tried to allocate'),
    RuntimeError('RESOURCE_EXHAUSTED: x'),
  ]
  assert [contender.told(e)['failed'] for e in full] == ['memory', 'memory']
  assert contender.told(ValueError('x')) == {'failed': 'error', 'told': 'ValueError: x'}
  assert contender.told(Mistake('x: got')) == {'failed': 'mistake', 'told': 'x: got'}
  assert contender.told(contender.Lacks('x'))['failed'] == 'lacks'


def test_each_library_is_alone_in_its_process(run_python):
  program = 'import sys, benchmarks.contender as c\n{}print(*{{"jax", "torch"}} & {{*sys.modules}})'
  started = "c.Torch({'platform': 'cpu'})\n"
  assert run_python(program.format(''), timeout=100).stdout == '\n'
  assert run_python(program.format(started), timeout=100).stdout == 'torch\n'


def test_weights_come_back_from_their_file(tmp_path):
  params = {'embed': np.ones((3, 2)), 'blocks': {'attn': {'qkv': np.arange(4)}}}
  contender.save(tmp_path / 'params.npz', params)
  small.assert_close(contender.load(tmp_path / 'params.npz'), params, 0, 0)


def options(**more):
  given = {'contenders': '', 'batch': 8, 'slices': 2, 'context': 16, 'remat': 'dots', 'repeats': 1}
  return argparse.Namespace(**given | {'steps': 3, 'halve': True, 'json': None} | more)


def test_on_a_gpu_one_runs_after_another_and_what_it_did_is_kept(tmp_path, monkeypatch, capsys):
  scripted(
    monkeypatch, f"if job['who'] == 'torch':\n  say(failed='lacks', told='no')\n{FULL}{STEPS}"
  )
  drawn = {'platform': 'gpu', 'kind': H100, 'shape': dataclasses.asdict(SHAPE)}
  monkeypatch.setattr(against.Race, '_draw', lambda _: drawn)
  out = tmp_path / 'a.json'
  with pytest.raises(Mistake, match='torch-compiled-bf16: no'):
    against.main(options(json=str(out)), [])
  assert '4 rows are too many' in capsys.readouterr().out
  rows = json.loads(out.read_text())['rows']
  assert list(rows) == against.ELSEWHERE
  assert rows['ours-bf16']['rows'] == 4
  assert rows['torch-compiled-bf16']['failed'] == 'lacks'


def test_other_losses_are_a_mistake(monkeypatch, capsys):
  scripted(monkeypatch, STEPS.replace('5.5 - i', "5.5 + (job['who'] == 'torch')"))
  monkeypatch.setattr(against, 'REST', 0.0)
  drawn = {'platform': 'cpu', 'kind': 'cpu', 'shape': dataclasses.asdict(SHAPE)}
  monkeypatch.setattr(against.Race, '_draw', lambda _: drawn)
  with pytest.raises(Mistake, match='first losses: got torch-eager-f32 6.5.* wanted the same'):
    against.main(options(contenders='ours-f32,torch-eager-f32'), [])
  assert 'not the same to 1e-05 in float32' in capsys.readouterr().out


# The work itself, in this process.


def test_ours_and_torch_take_the_same_steps(tmp_path, monkeypatch):
  """From the same weights, three steps of different windows and rates, the last with few rows."""
  settings = runs.SETTINGS | {'data.sources': 'none', 'workdir': 'none', 'compute.dtype': 'float32'}
  words = ['--config=configs/tiny.py', *(f'--config.{k}={v}' for k, v in settings.items())]
  random = np.random.default_rng(0)
  windows = random.integers(0, 257, (3, 2, 3, runs.CONTEXT + 1)).astype('uint16')
  for name, array in (('tokens', windows), ('rows', [6, 6, 4]), ('rates', [1e-3, 3e-3, 2e-3])):
    np.save(tmp_path / f'{name}.npy', array)
  monkeypatch.setattr(contender, 'SQUARE', 8)
  job = {'words': words, 'folder': str(tmp_path), 'dtype': 'float32', 'each': None, 'products': 1}
  answers = []
  contender.work(job | {'who': 'weights'}, answers.append)
  (drawn,) = answers
  assert drawn['platform'] == 'cpu' and drawn['shape']['windows'] == (None, 8)
  job |= {'shape': json.loads(json.dumps(drawn['shape'])), 'platform': 'cpu', 'bands': 'mask'}
  losses = []
  for who in ('ours', 'torch'):
    answers.clear()
    monkeypatch.setattr(sys, 'stdin', io.StringIO('1\n3\n'))
    contender.work(job | {'who': who, 'compiled': False}, answers.append)
    ready, first, rest = answers
    assert ready['product'] > 0 and rest['seconds'] > 0 and rest['peak_bytes'] > 2**20
    losses.append(first['losses'] + rest['losses'])
  assert len(losses[0]) == 4
  assert losses[1] == pytest.approx(losses[0], rel=1e-5)
  assert len({round(loss, 3) for loss in losses[0]}) == 4  # so that order and rates show
  assert losses[0][3] < losses[0][0]  # the first windows again


def test_torch_without_a_gpu_is_told_where_jax_has_one(monkeypatch):
  monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
  with pytest.raises(contender.Lacks, match='which sees none, wanted the gpu that JAX uses'):
    contender.Torch({'platform': 'gpu'})
