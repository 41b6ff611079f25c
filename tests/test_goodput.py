"""Every second of a run is accounted for once."""

import math

import pytest

from gptjax import goodput


def clock(records):
  """Records with the time at which each was written: after its `seconds`, or `wait` if it says."""
  now, timed = 1000.0, []
  for r in records:
    now += r.pop('wait', 0.0) + r.get('seconds', 0.0) + r.get('setup_seconds', 0.0)
    timed.append(r | {'time': now})
  return timed


def start(setup, restore=0.0, **more):
  return {'kind': 'start', 'setup_seconds': setup, 'restore_seconds': restore} | more


def step(number, seconds, first=False):
  record = {'kind': 'train', 'step': number, 'seconds': seconds}
  return record if first else record | {'tokens_per_second': 1.0}


RUN = [
  start(20.0),
  step(1, 32.0, first=True),
  step(2, 2.0),
  step(3, 2.0),
  {'kind': 'skip', 'step': 3},
  {'kind': 'validation', 'step': 3, 'seconds': 5.0},
  step(4, 2.0, first=False),
  {'kind': 'save', 'step': 4, 'seconds': 0.5},
  # Six steps were taken and lost, and it was found ten minutes after.
  start(21.0, restore=4.0, heard=1075.5, wait=612.0),
  step(5, 12.0, first=True),
  step(6, 2.0),
]


def test_each_second_has_its_part():
  spent = goodput.account(clock([dict(r) for r in RUN]))
  assert spent == {
    'training': 10.0,
    'starting': 37.0,
    'restoring': 4.0,
    'compiling': 40.0,
    'validating': 5.0,
    'saving': 0.5,
    'skipped': 2.0,
    'repeated': 12.0,
    'down': 600.0,
    'other': 0.0,
  }
  assert set(spent) == set(goodput.PARTS)


def test_what_is_lost_twice_is_counted_once():
  """A second start, whose steps are lost with some of the first's."""
  records = [
    start(10.0),  # 1000 to 1010
    step(1, 5.0, first=True),  # and heard until 1030
    start(10.0, heard=1030.0, wait=115.0),  # 1130 to 1140, heard until 1150
    start(10.0, heard=1150.0, wait=60.0),  # 1200 to 1210
    step(2, 5.0),
  ]
  timed = clock(records)
  spent = goodput.account(timed)
  assert (spent['repeated'], spent['down'], spent['starting']) == (15.0 + 10.0, 150.0, 30.0)
  assert math.fsum(spent.values()) == pytest.approx(timed[-1]['time'] - 1000.0)


def test_what_no_record_tells_is_other():
  records = [dict(r) for r in RUN]
  records[3]['wait'] = 7.0
  timed = clock(records)
  spent = goodput.account(timed)
  assert spent['other'] == pytest.approx(7.0)
  whole = timed[-1]['time'] - 1000.0
  assert math.fsum(spent.values()) == pytest.approx(whole)


def test_records_before_times_were_kept_are_left_out():
  old = [{'kind': 'train', 'step': 0, 'seconds': 9.0}]
  timed = clock([dict(r) for r in RUN])
  assert goodput.account(old) == {} and goodput.table(old) == ''
  assert goodput.account(old + timed) == goodput.account(timed)


def test_the_table_says_how_much_was_training():
  told = goodput.table(clock([dict(r) for r in RUN]))
  assert told.startswith('goodput   1.4% of 710 s in 2 starts\n')
  assert '  down             600.0 s   84.4%  between' in told and '  other' not in told
