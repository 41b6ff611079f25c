"""What fails to be saved is tried again, and ends the run only after too often in a row."""

import pytest

from gptjax import saver
from gptjax.errors import Mistake
from gptjax.schedule import Step


class Checkpoints:
  """Stands for a disk that fails when it is told to, at once or in the background."""

  def __init__(self):
    self.at_once, self.later, self.saved, self.pending = [], [], [], None

  def save(self, sequences, state, record):
    if self.at_once and self.at_once.pop(0):
      raise Mistake('no room, at once')
    failed = bool(self.later) and self.later.pop(0)
    self.pending = (True, Mistake('no room') if failed else None)
    if not failed:
      self.saved.append((sequences, record['step']))

  def poll(self):
    ended, self.pending = self.pending or (False, None), None
    return ended

  def wait(self):
    _, failed = self.poll()
    if failed:
      raise failed


@pytest.fixture
def made(monkeypatch):
  monkeypatch.setattr(saver, 'PAUSE', 0.0)
  checkpoints, said = Checkpoints(), []
  return saver.Saver(checkpoints, {'a': 1}, 3, said.append), checkpoints, said


STEPS = [Step(n, 8 * n - 8, 8 * n) for n in range(1, 20)]


def walk(one, steps, due):
  for step in steps:
    if one.again(step) or step.number in due:
      one.save(step, {})


@pytest.mark.parametrize('when', ['at_once', 'later'])
def test_what_failed_is_saved_after_the_next_step(made, when):
  one, checkpoints, said = made
  setattr(checkpoints, when, [False, True, True, False])
  walk(one, STEPS[:12], due={3, 6, 12})
  assert [step for _, step in checkpoints.saved] == [3, 8, 12]
  assert len(said) == 2 and said[1].startswith('FAILED   no room') and '2 in a row' in said[1]


@pytest.mark.parametrize('when', ['at_once', 'later'])
def test_too_many_in_a_row_end_the_run(made, when):
  one, checkpoints, said = made
  setattr(checkpoints, when, [True, True, False, True, True, True])
  with pytest.raises(Mistake, match='no room'):
    walk(one, STEPS, due={1, 10})
  assert len(checkpoints.saved) == 1 and len(said) == 5


def test_the_last_one_is_tried_until_it_went_well(made):
  one, checkpoints, said = made
  checkpoints.later, checkpoints.at_once = [True, False], [True, False]
  assert one.save(STEPS[4], {}, last=True) >= 0
  assert checkpoints.saved == [(40, 5)] and len(said) == 2
  checkpoints.later = [True] * 9
  with pytest.raises(Mistake, match='no room'):
    one.save(STEPS[5], {}, last=True)
