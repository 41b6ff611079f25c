"""What a run does when something breaks: it ends as if nothing had, or says why it cannot."""

import json
import os
import random
import signal
import sys

import jax
import numpy as np
import pytest

from benchmarks import chaos
from gptjax import checkpoint, preemption, process, skips, train
from gptjax.config import resolve
from gptjax.errors import Mistake
from tests.conftest import DEVICES, FAST
from tests.runs import args, config, records

NAN = float('nan')
# Steps of 24 sequences from 64 on, saved and judged often.
SETTINGS = {
  'batch__ramp_tokens': 0.0,
  'train_tokens': 24 * 20 * 32.0,
  'save__every_tokens': 24 * 3 * 32.0,
  'eval__every_tokens': 0.0,
  'save__keep': 3,
  'stability__window': 8,
  'stability__streak': 2,
  'mesh__data': 8,
}


def run(workdir, corpus, **settings):
  train.main(config(workdir, corpus, **SETTINGS | settings))


def end_of(workdir, corpus):
  """The last checkpoint's place and state, as NumPy."""
  c = config(workdir, corpus, **SETTINGS | {'mesh__data': 1})
  return chaos.end_of(workdir, resolve(c, jax.devices()[:1]))[:2]


def assert_same_end(a, b, corpus):
  (at, one), (then, other) = end_of(a, corpus), end_of(b, corpus)
  assert at == then
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_bad_step_is_left_out_and_told(poisoned, corpus, tmp_path, capsys):
  poisoned.append((range(120, 144), NAN, 1.0))
  run(tmp_path, corpus)
  (skip,) = records(tmp_path, 'skip')
  assert np.isnan(skip.pop('loss'))
  why = 'loss or gradient is not finite'
  clock = {'step': 6, 'sequences': 144, 'tokens': 144 * 32, 'start': 120}
  assert skip == {'kind': 'skip', 'why': why, 'streak': 1} | clock
  steps = records(tmp_path)
  assert [r['step'] for r in steps] == list(range(1, 21))
  assert steps[5]['update_norm'] == 0 and steps[5]['param_norm'] == steps[4]['param_norm']
  assert f'skipped  step 6, sequences 120 to 143: {why}; 1 in a row' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize('waits', [False, True])
def test_a_streak_rolls_back_and_ends_as_if_never_seen(
  poisoned, corpus, tmp_path, capsys, monkeypatch, waits
):
  """The checkpoint made while the state was bad is forgotten; the clock jumps."""
  monkeypatch.setattr(process, 'waits_for', lambda device: waits)
  poisoned.append((range(216, 288), 1.0, NAN))  # a checkpoint is made at 216, and one at 288
  run(tmp_path / 'run', corpus, stability__streak=3)
  told = capsys.readouterr().out
  why = 'loss or gradient is not finite'
  assert f'rollback sequences 216 to 287 ({why}): sequences 216 to 287 ({why}) are left' in told
  assert 'skipped  sequences 216–287\n' in told and 'start    sequence 216, step 10' in told
  (rollback,) = skips.read(tmp_path / 'run')
  assert (rollback.start, rollback.stop) == (216, 288)
  run(tmp_path / 'by_hand', corpus, stability__streak=3, skip_sequences='216-287')
  assert records(tmp_path / 'run') == records(tmp_path / 'by_hand')
  assert [r['sequences'] for r in records(tmp_path / 'run')][8:11] == [216, 312, 336]
  assert_same_end(tmp_path / 'run', tmp_path / 'by_hand', corpus)


@pytest.mark.slow
def test_a_rollback_without_a_checkpoint_starts_anew(poisoned, corpus, tmp_path):
  poisoned.append((range(24, 72), NAN, 1.0))
  run(tmp_path / 'run', corpus)
  run(tmp_path / 'by_hand', corpus, skip_sequences='0-71')
  assert records(tmp_path / 'run') == records(tmp_path / 'by_hand')
  assert_same_end(tmp_path / 'run', tmp_path / 'by_hand', corpus)


@pytest.mark.slow
def test_rollbacks_end_and_the_run_says_why(poisoned, corpus, tmp_path):
  poisoned.append((range(144, 999), NAN, 1.0))
  settings = {'stability__rollbacks': 2, 'save__keep': 9}
  left_out = '2 bad steps in a row, sequences 240 to 287 .*144 to 191 .*, sequences 72 to 239 '
  with pytest.raises(Mistake, match=left_out + '.*wanted no more than 2 rollbacks'):
    run(tmp_path, corpus, **settings)
  assert [(r.start, r.stop) for r in skips.read(tmp_path)] == [(144, 192), (72, 240)]
  # And again, until a person decides: nothing was lost.
  with pytest.raises(Mistake, match='sequences 240 to 287'):
    run(tmp_path, corpus, **settings)
  poisoned.clear()
  run(tmp_path, corpus, **settings)
  assert records(tmp_path)[-1]['sequences'] == 480


@pytest.mark.slow
def test_what_is_skipped_is_skipped_from_any_checkpoint(corpus, tmp_path):
  """A run that stops within the stretch, before and behind it."""
  skip = {'skip_sequences': '100-130,200-239'}
  run(tmp_path / 'whole', corpus, **skip)
  for tokens in (100, 245):
    part = {
      'train_tokens': tokens * 32.0,
      'resume__accept_changes': True,
      'lr__decay_tokens': 12288.0,
    }
    run(tmp_path / 'parts', corpus, **skip | part)
  run(tmp_path / 'parts', corpus, **skip, resume__accept_changes=True)
  seen = lambda name: [(r['sequences'], r['batch']) for r in records(tmp_path / name)]
  covered = lambda name: sorted(i for end, rows in seen(name) for i in range(end - rows, end))
  wanted = [i for i in range(480) if not (100 <= i <= 130 or 200 <= i <= 239)]
  assert covered('parts') == covered('whole') == wanted
  # What comes due in a stretch is done behind it: 144, and 216.
  assert [r['sequences'] for r in records(tmp_path / 'whole', 'save')][:4] == [72, 155, 264, 288]


@pytest.mark.slow
def test_a_skip_to_the_end_ends_the_run(corpus, tmp_path, capsys):
  run(tmp_path, corpus, skip_sequences='400-1000')
  assert records(tmp_path)[-1]['sequences'] == 400
  run(tmp_path, corpus, skip_sequences='400-1000')
  assert 'nothing is left to train' in capsys.readouterr().out
  assert json.loads((tmp_path / 'config.json').read_text())['skip_sequences'] == '400-1000'


@pytest.mark.slow
def test_a_skip_is_part_of_the_recipe(corpus, tmp_path):
  run(tmp_path, corpus, train_tokens=24 * 4 * 32.0)
  with pytest.raises(Mistake, match='skip_sequences'):
    run(tmp_path, corpus, train_tokens=24 * 4 * 32.0, skip_sequences='200-300')


def endure(corpus, folder, kills, seed):
  """What kills hit in a run, after which nothing is different."""
  stormy = {
    'eval__every_tokens': 24 * 5 * 32.0,
    'eval__sequences': 200,
    'save__every_tokens': 24 * 2 * 32.0,
    'mesh__data': 1,
    'train_tokens': 24 * 16.0 * 32 * (2 + kills),
    'lr__decay_tokens': 1e6,
  }
  one = f'XLA_FLAGS={DEVICES}=1 {FAST}'
  trained = lambda workdir: args(workdir, corpus, **SETTINGS | stormy)
  command = lambda workdir: ['env', one, sys.executable, *trained(workdir)]
  run = resolve(config(folder, corpus, **SETTINGS | stormy), jax.devices()[:1])
  chaos.Storm(command(folder / 'calm'), folder / 'calm', run, seed).calm()
  print('seed', seed)
  hit = chaos.weather(command, folder, run, kills, seed, print)
  assert chaos.differences(folder / 'calm', folder / 'stormy', run) == []
  return hit


@pytest.mark.slow
def test_a_run_killed_a_dozen_times_is_the_run_that_was_not(corpus, tmp_path):
  hit = endure(corpus, tmp_path, kills=12, seed=random.randrange(2**32))
  assert len(hit) == 12 and len(set(hit)) > 2
  starts = [r for r in records(tmp_path / 'stormy', 'start') if r['sequences']]
  assert starts  # some of it went on from a checkpoint


@pytest.mark.slow
def test_a_storm_sees_what_is_different(corpus, tmp_path):
  run_ = resolve(config(tmp_path, corpus, **SETTINGS), jax.devices())
  for name, rate in (('a', 1e-2), ('b', 1.1e-2)):
    run(tmp_path / name, corpus, lr__peak=rate, train_tokens=24 * 3 * 32.0)
  found = chaos.differences(tmp_path / 'a', tmp_path / 'b', run_)
  assert '3 and 3 records of kind train' in found and "['params']['embed']" in found
  assert chaos.differences(tmp_path / 'a', tmp_path / 'a', run_) == []


@pytest.mark.slow
def test_another_recipe_is_judged_anew(corpus, tmp_path):
  """A rate that is too high is the user's wish, and its higher loss no spike of the old one."""
  part = {'train_tokens': 24 * 9 * 32.0}
  run(tmp_path, corpus, **part)
  assert end_of(tmp_path, corpus)[1]['health']['good'] == 9
  run(tmp_path, corpus, lr__peak=2e-2, resume__accept_changes=True)
  assert end_of(tmp_path, corpus)[1]['health']['good'] == 11


@pytest.mark.slow
def test_what_is_saved_in_a_streak_pushes_no_good_checkpoint_out(poisoned, corpus, tmp_path):
  poisoned.append((range(264, 336), NAN, 1.0))
  run(tmp_path, corpus, save__keep=1, save__every_tokens=24 * 32.0, stability__streak=3)
  (rollback,) = skips.read(tmp_path)
  assert (rollback.start, rollback.stop) == (264, 336)
  assert [r['sequences'] for r in records(tmp_path)][9:13] == [240, 264, 360, 384]


@pytest.mark.slow
def test_a_checkpoint_that_did_not_help_is_not_gone_back_to_again(poisoned, corpus, tmp_path):
  """The state may be bad before a step shows it."""
  poisoned += [(range(216, 264), NAN, 1.0), (range(264, 312), NAN, 1.0)]
  run(tmp_path, corpus, save__keep=9)
  assert [(r.start, r.stop) for r in skips.read(tmp_path)] == [(216, 264), (144, 312)]
  assert [r['sequences'] for r in records(tmp_path)][5:8] == [144, 336, 360]


@pytest.mark.slow
def test_no_good_checkpoint_is_told_and_nothing_thrown_away(poisoned, corpus, tmp_path):
  run(tmp_path, corpus, save__keep=1, train_tokens=24 * 12 * 32.0)
  before = records(tmp_path)
  poisoned.append((range(288, 999), NAN, 1.0))
  told = 'after leaving out sequences 288 to .*wanted a checkpoint before'
  with pytest.raises(Mistake, match=told):
    run(tmp_path, corpus, save__keep=1, resume__accept_changes=True)
  assert records(tmp_path)[:12] == before
  assert (tmp_path / 'checkpoints' / '288').exists()


@pytest.mark.slow
def test_sigterm_is_heard_through_a_rollback(poisoned, corpus, tmp_path, monkeypatch):
  poisoned.append((range(144, 192), NAN, 1.0))
  real = train.roll_back

  def terminated(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    real(*args)

  monkeypatch.setattr(train, 'roll_back', terminated)
  with pytest.raises(SystemExit) as e:
    run(tmp_path, corpus)
  assert e.value.code == preemption.AGAIN
  assert records(tmp_path)[-1]['sequences'] == 216  # the first step after it


@pytest.mark.slow
def test_a_trace_ends_with_a_rollback(poisoned, corpus, tmp_path):
  poisoned.append((range(144, 192), NAN, 1.0))
  run(tmp_path, corpus, profile='4-9')
  assert records(tmp_path)[-1]['sequences'] == 480


@pytest.mark.slow
def test_a_start_that_skips_much_may_die_before_it_saves(corpus, tmp_path, monkeypatch):
  skip = {'skip_sequences': '0-399', 'save__every_tokens': 24 * 3 * 32.0}
  monkeypatch.setattr(checkpoint.Checkpoints, 'save', lambda *_: False)  # as if it died before
  run(tmp_path, corpus, **skip)
  monkeypatch.undo()
  run(tmp_path, corpus, **skip)
  assert [r['sequences'] for r in records(tmp_path)] == [424, 448, 472, 480]


def test_a_run_without_any_sequence_is_told(corpus, tmp_path):
  with pytest.raises(Mistake, match='sequences: got none that are not left out'):
    run(tmp_path, corpus, skip_sequences='0-1000')


STANDS = """
import runpy, sys, time
from gptjax import loop, watchdog
watchdog.LATER = 0.2
read, calls = loop.Trainer.read, []
def slow(self):
  calls.append(1)
  if len(calls) == 6:
    time.sleep(6)
  return read(self)
loop.Trainer.read = slow
runpy.run_module('gptjax.train', run_name='__main__')
"""


def test_a_step_that_does_not_end_is_told_with_where_it_stands(corpus, tmp_path, run_python):
  given = args(tmp_path, corpus, watchdog__seconds=2.0, watchdog__ends=True)
  done = run_python(['-c', STANDS, *given[2:]], timeout=100, code=1)
  assert 'STUCK    for 2 s' in done.stderr and 'in: step ' in done.stderr
  assert 'in slow' in done.stderr and 'to be started again' in done.stderr
