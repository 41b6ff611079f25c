"""Two curves from the same weights and windows: what is read, what is compared, what is drawn."""

import json

import numpy as np
import pytest

from benchmarks import against, curve
from gptjax import schedule
from gptjax.data.corpora import open_all
from gptjax.data.mixture import Mixture, Stage
from gptjax.errors import Mistake
from tests import runs


def words(corpus, **settings):
  return runs.args('unused', corpus, **settings)[2:]


def test_windows_rows_and_rates_are_those_of_the_run(corpus):
  token_sgbl, rows, rates = curve.windows(words(corpus), 12)
  assert token_sgbl.shape == (12, 24, 1, runs.CONTEXT + 1)
  opened = open_all(corpus, against.Shape(2, 32, 4, 8, 64, runs.CONTEXT, 257, (None,)))
  stream = opened.stream(Mixture([Stage(0, opened.stage)]), 0)
  ramp = schedule.Ramp.linear(8, 24, 8, 64, 384)
  for s, step in zip(range(12), ramp.steps(), strict=False):
    assert rows[s] == step.rows
    wanted_rl = np.stack([stream[i] for i in range(step.start, step.end)])
    np.testing.assert_array_equal(token_sgbl[s].reshape(24, -1)[: step.rows], wanted_rl)
    assert not token_sgbl[s].reshape(24, -1)[step.rows :].any()
  assert rows[0] == 8 < rows[-1]
  assert rates[0] == pytest.approx(1e-2 * 8 / 64) and max(rates) > rates[-1] > 0


def test_more_steps_than_the_run_has_are_told(corpus):
  with pytest.raises(Mistake, match=r'--steps: got 1000, wanted at most \d+, all of the run'):
    curve.windows(words(corpus), 1000)


def test_a_curve_that_differs_is_told_and_drawn(corpus, tmp_path, monkeypatch, capsys):
  told = {'ours-f32': [3.0, 2.5, 2.0], 'torch-eager-f32': [3.0, 2.5, 2.25]}
  monkeypatch.setattr(curve, 'losses', lambda race, name, count: told[name])
  monkeypatch.setattr(
    against.Race, '_draw', lambda _: {'platform': 'cpu', 'kind': 'cpu', 'shape': SHAPE}
  )
  out = [f'--out={tmp_path / "c.png"}', f'--json={tmp_path / "c.json"}']
  curve.main(['--steps=3', *out, *words(corpus)])
  printed = capsys.readouterr().out
  assert 'torch-eager-f32 and ours-f32: at most 0.25 nats apart, at step 3; 0.083' in printed
  assert (tmp_path / 'c.png').read_bytes().startswith(b'\x89PNG')
  record = json.loads((tmp_path / 'c.json').read_text())
  assert record['losses'] == told and record['apart'] == {'torch-eager-f32': 0.25}


SHAPE = {
  'n_layers': 2,
  'd_model': 32,
  'n_heads': 4,
  'd_head': 8,
  'd_ff': 64,
  'context': runs.CONTEXT,
  'vocab_size': 257,
  'windows': [None, 8],
}


@pytest.mark.slow
def test_both_learn_the_same(corpus, tmp_path, run_python):
  json_file = tmp_path / 'c.json'
  out = [f'--out={tmp_path / "c.png"}', f'--json={json_file}', '--steps=20']
  done = run_python(['-m', 'benchmarks.curve', *out, *words(corpus)], timeout=300)
  assert 'torch-eager-f32 and ours-f32: at most' in done.stdout
  record = json.loads(json_file.read_text())
  ours, theirs = record['losses'].values()
  assert len(ours) == len(theirs) == 20 and ours[-1] < ours[0] - 1
  assert record['apart']['torch-eager-f32'] < 1e-3
