"""A run that does not come on says where it stands, and ends if it is to."""

import pytest

STUCK = """
import sys, threading, time
from gptjax import watchdog
watchdog.FIRST, watchdog.LATER = 0.6, 0.2
def waits_for_ever():
  threading.Event().wait(3)
with watchdog.Watchdog(float(sys.argv[1]), ends='ends' in sys.argv) as dog:
  for i in range(4):
    dog.beat(f'step {i}')
    dog.warm()
    time.sleep(0.05)
  if 'stuck' in sys.argv:
    waits_for_ever()
time.sleep(0.9)
print('done')
"""


def test_who_stands_still_is_told_with_the_stacks_of_all_threads(run_python):
  done = run_python(['-c', STUCK, 0.3, 'stuck'], timeout=60)
  assert done.stderr.count('STUCK    for 0.3 s, since ') == 1
  assert 'in: step 3; it may still come on' in done.stderr
  assert 'waits_for_ever' in done.stderr and 'most recent call first' in done.stderr
  assert done.stdout == 'done\n'


def test_and_ends_if_it_is_to(run_python):
  done = run_python(['-c', STUCK, 0.3, 'stuck', 'ends'], timeout=60, code=1)
  assert 'this process ends, to be started again' in done.stderr
  assert 'waits_for_ever' in done.stderr and done.stdout == ''


@pytest.mark.parametrize('words', [(0.3,), (0, 'stuck', 'ends')])
def test_who_comes_on_or_is_not_watched_is_left_alone(run_python, words):
  done = run_python(['-c', STUCK, *words], timeout=60)
  assert done.stdout == 'done\n' and not done.stderr


def test_the_first_step_has_more_time(run_python):
  late = STUCK.replace('    dog.warm()\n', '').replace('for i in range(4)', 'for i in range(1)')
  done = run_python(['-c', late.replace('wait(3)', 'wait(0.5)'), 0.1, 'stuck'], timeout=60)
  assert done.stdout == 'done\n' and not done.stderr
