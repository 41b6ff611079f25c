"""Of two runs in one workdir the second is refused, and a dead one is in nobody's way."""

import json
import os
import pathlib
import signal
import threading
import time

import pytest

from gptjax import lease
from gptjax.errors import Mistake
from gptjax.lease import Lease
from tests.runs import args, records, wait_for_records


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(lease, 'RENEWED', 0.05)
  monkeypatch.setattr(lease, 'EXPIRES', 0.5)


def claims(workdir):
  return sorted(workdir.glob('lease.*.json'))


def held(workdir):
  """What is in the one claim that there is."""
  (path,) = claims(workdir)
  text = path.read_text()
  return json.loads(text) if text else held(workdir)  # it was being written


def elsewhere(workdir):
  """The claim of a run on another machine, and its place."""
  me = {'where': ['other', 'boot', 'pid:[1]'], 'pid': 7, 'began': '1', 'holds': True}
  return workdir / 'lease.1234.json', me | {'renewed': 1}


def test_it_is_held_renewed_and_given_back(tmp_path):
  with Lease(tmp_path):
    first = held(tmp_path)
    assert first['pid'] == os.getpid()
    while held(tmp_path)['renewed'] < first['renewed'] + 2:
      time.sleep(0.01)
    with pytest.raises(Mistake, match=f'process {os.getpid()} on .* trains, wanted one run'):
      Lease(tmp_path).__enter__()
  assert not claims(tmp_path)
  with Lease(tmp_path, enabled=False):
    assert not claims(tmp_path)


def test_a_holder_on_this_machine_that_is_dead_is_not_waited_for(tmp_path, run_python, monkeypatch):
  take = 'from gptjax.lease import Lease; Lease(sys.argv[1]).__enter__()'
  run_python(['-c', f'import os, sys; {take}; os._exit(0)', tmp_path], timeout=60)
  monkeypatch.setattr(lease, 'EXPIRES', 1e9)
  assert held(tmp_path)['pid'] != os.getpid()
  with Lease(tmp_path):
    assert held(tmp_path)['pid'] == os.getpid()
    # A process number that came again is another process.
    assert lease._dead(held(tmp_path) | {'began': '1'}) and not lease._dead(held(tmp_path))


def test_one_on_another_machine_is_waited_for_as_long_as_it_may_take(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(lease, 'TOLD', 0.1)
  path, other = elsewhere(tmp_path)
  path.write_text(json.dumps(other))
  start = time.monotonic()
  with Lease(tmp_path):
    assert time.monotonic() - start >= 0.5
  told = capsys.readouterr().err
  assert told == 'lease    waiting up to 0 s to see whether process 7 on other still trains\n'
  stop = threading.Event()

  def live():
    for i in range(1000):
      path.write_text(json.dumps(other | {'renewed': i}))
      if stop.wait(0.02):
        return

  thread = threading.Thread(target=live)
  thread.start()
  while not path.exists():
    time.sleep(0.001)
  with pytest.raises(Mistake, match='process 7 on other trains'):
    Lease(tmp_path).__enter__()
  stop.set()
  thread.join()
  assert claims(tmp_path) == [path]  # who is refused leaves nothing


@pytest.mark.parametrize('text', ['{"id"', '', '[1]', '{"a": 1}', '123'])
def test_a_file_that_tells_of_no_holder_is_none_when_it_stays(tmp_path, text):
  (tmp_path / 'lease.1234.json').write_text(text)
  start = time.monotonic()
  with Lease(tmp_path):
    assert held(tmp_path)['pid'] == os.getpid() and time.monotonic() - start >= 0.5
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize('before', [None, '{"id"'])
def test_of_several_that_take_it_at_once_one_has_it(tmp_path, before):
  for i in range(10):
    workdir, at_once, ended = tmp_path / str(i), threading.Barrier(4), []
    workdir.mkdir()
    if before:
      (workdir / 'lease.1234.json').write_text(before)

    def take(workdir=workdir, at_once=at_once, ended=ended):
      one = Lease(workdir)
      at_once.wait()
      try:
        ended.append(one.__enter__())
      except Mistake:
        ended.append(None)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    (holder,) = filter(None, ended)
    assert len(ended) == 4 and claims(workdir) == [pathlib.Path(holder._path)]
    holder.__exit__()


LOST = """
import sys, time
from gptjax import lease
lease.RENEWED = 0.05
with lease.Lease(sys.argv[1]) as mine:
  mine._path.unlink()
  time.sleep(30)
"""


def test_who_lost_it_ends_at_once(tmp_path, run_python):
  done = run_python(['-c', LOST, tmp_path], timeout=60, code=1)
  assert 'another run took it over, as this one seemed dead' in done.stderr


def test_who_was_stopped_while_another_took_over_gives_it_up(tmp_path):
  """Even if its claim is back: it was about to be written when the process was stopped."""
  first = Lease(tmp_path)
  assert first._write(holds=True)
  first._renewed -= 10
  assert first._write(holds=True)  # nobody came
  path, other = elsewhere(tmp_path)
  path.write_text(json.dumps(other | {'holds': False}))
  first._renewed -= 10
  assert first._write(holds=True)  # it does not hold yet, and looks again when it does
  path.write_text(json.dumps(other))
  assert first._write(holds=True)  # in time: it is the other that goes back
  first._renewed -= 10
  assert not first._write(holds=True)
  assert claims(tmp_path) == [path]


def test_a_write_that_took_long_counts_from_when_it_began(tmp_path, monkeypatch):
  """The other one may have seen it at once, and waited since."""
  first, write_text = Lease(tmp_path), type(Lease(tmp_path)._path).write_text
  assert first._write(holds=True)

  def slow(path, text):
    write_text(path, text)
    if path == first._path:
      time.sleep(0.3)

  monkeypatch.setattr(type(first._path), 'write_text', slow)
  assert first._write(holds=True)
  path, other = elsewhere(tmp_path)
  path.write_text(json.dumps(other))
  assert not first._write(holds=True)  # 0.6 s after the last one began, though 0.3 s after it ended


@pytest.mark.slow
def test_a_second_run_is_refused_and_one_after_a_kill_goes_on(
  straight, corpus, tmp_path, start_python, run_python
):
  first = start_python(args(tmp_path, corpus, train_tokens=1e6))
  wait_for_records(tmp_path, first, 4)
  told = run_python(args(tmp_path, corpus, train_tokens=1e6), timeout=60, code=2).stderr
  assert f'process {first.pid} on ' in told and 'another workdir' in told
  assert first.poll() is None
  first.send_signal(signal.SIGKILL)
  first.communicate()
  run_python(args(tmp_path, corpus, resume__accept_changes=True), timeout=200)
  # The rest of the run had another length.
  assert records(tmp_path)[:15] == records(straight[0])[:15]
