"""What training does between steps."""

import os
import signal

import pytest

from gptjax import checkpoint, goodput, integrity, journal, preemption, train
from gptjax.errors import Mistake
from tests.runs import args, config, records, wait_for_records


@pytest.mark.slow
def test_sigterm_saves_after_the_step_and_asks_to_be_started_again(
  straight, corpus, tmp_path, start_python, run_python
):
  process = start_python(args(tmp_path, corpus))
  wait_for_records(tmp_path, process, 7)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=100)
  assert process.returncode == preemption.AGAIN == 75
  assert 'ended    SIGTERM: sequence ' in err and ' s after it came; the same command' in err
  assert 'Traceback' not in err
  last = records(tmp_path)[-1]['sequences']
  assert last < 384 and f'sequence {last} was saved' in err
  assert 'start    sequence ' + str(last) in run_python(args(tmp_path, corpus), timeout=200).stdout
  assert records(tmp_path) == records(straight[0])
  assert [r['sequences'] for r in records(tmp_path, 'start')] == [0, last]


@pytest.mark.slow
def test_saves_that_fail_are_told_and_tried_again(corpus, tmp_path, monkeypatch, capsys):
  real, failures = integrity.write_list, [True, True]

  def flaky(*args):
    if failures and failures.pop():
      raise OSError(28, 'No space left on device')
    real(*args)

  monkeypatch.setattr(integrity, 'write_list', flaky)
  train.main(config(tmp_path, corpus, mesh__data=8))
  told = capsys.readouterr().err
  assert told.count('FAILED   checkpoints in ') == 2 and '2 in a row, and at 3 the run ends' in told
  assert records(tmp_path)[-1]['sequences'] == 384
  monkeypatch.setattr(integrity, 'write_list', lambda *_: 1 / 0)
  with pytest.raises(Mistake, match='ZeroDivisionError'):
    train.main(config(tmp_path / 'other', corpus, mesh__data=8))


def test_a_run_accounts_for_its_time(straight):
  found = journal.read(straight[0])
  kinds = [r['kind'] for r in found]
  assert kinds[:3] == ['start', 'baseline', 'train']
  assert kinds.count('save') == 6 and kinds.count('validation') == 3
  whole = found[-1]['time'] - found[0]['time'] + found[0]['setup_seconds']
  spent = goodput.account(found)
  assert sum(spent.values()) == pytest.approx(whole, rel=1e-6)
  assert all(spent[part] > 0 for part in ('training', 'starting', 'compiling', 'saving'))
  assert spent['down'] == spent['repeated'] == spent['skipped'] == 0


@pytest.mark.slow
def test_lost_steps_are_counted_when_they_are_taken_again(corpus, tmp_path, start_python):
  process = start_python(args(tmp_path, corpus, save__every_tokens=0.0))
  wait_for_records(tmp_path, process, 7)
  process.kill()
  process.communicate()
  taken = len(records(tmp_path))
  train.main(config(tmp_path, corpus, mesh__data=8, save__every_tokens=0.0))
  first, second = (r for r in journal.read(tmp_path) if r['kind'] == 'start')
  assert first['lost_steps'] == 0 and 'heard' not in first
  assert second['lost_steps'] == taken > 3 and second['heard'] > first['time']
  assert len(records(tmp_path)) == 20


@pytest.mark.slow
def test_metrics_are_on_disk_before_the_checkpoint_that_covers_them(corpus, tmp_path, monkeypatch):
  order, fsync, save = [], os.fsync, checkpoint.Checkpoints.save

  def synced(fd):
    order.append(os.readlink(f'/proc/self/fd/{fd}'))
    fsync(fd)

  def saved(*args):
    order.append('save')
    save(*args)

  monkeypatch.setattr(os, 'fsync', synced)
  monkeypatch.setattr(checkpoint.Checkpoints, 'save', saved)
  train.main(config(tmp_path, corpus, mesh__data=8, train_tokens=2048.0))
  told = [o for o in order if o == 'save' or o.endswith('metrics.jsonl')]
  assert told and told[::2] == [str(tmp_path / 'metrics.jsonl')] * (len(told) // 2)
  assert told[1::2] == ['save'] * (len(told) // 2)


COUNT = """
import jax, runpy
hits = []
heard = lambda name, **_: hits.append(name) if 'cache_hits' in name else None
jax.monitoring.register_event_listener(heard)
runpy.run_module('gptjax.train', run_name='__main__')
print('found', len(hits))
"""


@pytest.mark.slow
def test_a_restart_finds_what_was_compiled(corpus, tmp_path, monkeypatch, run_python):
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  for tokens, found in (512.0, False), (1024.0, True):
    flags = args(tmp_path, corpus, train_tokens=tokens, resume__accept_changes=True)[2:]
    told = run_python(['-c', COUNT, *flags], timeout=100).stdout
    assert (int(told.split('found ')[1]) > 0) == found
    assert [*tmp_path.glob('cache/jit_train_step*')]
