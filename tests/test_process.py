"""A process has an age, and one that is gone has none."""

import os
import subprocess
import sys
import time

import pytest

from gptjax import process


def test_the_age_of_this_process_grows_with_the_clock():
  before = process.age()
  time.sleep(0.05)
  assert process.age() >= before + 0.05 > 0.05
  assert process.began() == process.began(os.getpid())


def test_one_that_is_gone_is_told_even_if_nobody_has_waited_for_it():
  child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)
  assert int(process.began(child.pid)) >= int(process.began())
  child.stdin.close()
  os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
  with pytest.raises(OSError):
    process.began(child.pid)
  child.wait()
  with pytest.raises(OSError):
    process.began(child.pid)
