"""SIGTERM is heard while a run trains, and only then."""

import os
import signal
import threading
import time

from gptjax import preemption


def test_a_notice_is_given_once_and_the_next_one_ends(capsys):
  before = signal.getsignal(signal.SIGTERM)
  with preemption.listening() as notice:
    assert notice.at is None
    os.kill(os.getpid(), signal.SIGTERM)
    while not notice.at:
      time.sleep(0.001)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert 0 <= time.time() - notice.at < 60
  assert signal.getsignal(signal.SIGTERM) == before
  assert 'SIGTERM: saving after the step that runs' in capsys.readouterr().err


def test_another_thread_listens_to_nothing():
  heard = []

  def listen():
    with preemption.listening() as notice:
      heard.append(notice.at)

  thread = threading.Thread(target=listen)
  thread.start()
  thread.join()
  assert heard == [None]
