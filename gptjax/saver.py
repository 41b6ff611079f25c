"""When a run saves: what is tried again, and when it gives up."""

import time
from collections.abc import Callable

import jax

from gptjax import hosts
from gptjax.checkpoint import Checkpoints
from gptjax.errors import Mistake
from gptjax.schedule import Step

PAUSE = 1.0  # seconds before the last checkpoint of a run is tried again


class Saver:
  """Saves, tries again after the next step what failed, and gives up after too many in a row."""

  def __init__(
    self, checkpoints: Checkpoints, record: dict, failures: int, say: Callable[[str], None]
  ):
    """`record` is what a checkpoint knows besides the clock."""
    self._checkpoints, self._record, self._most = checkpoints, record, failures
    self._say, self._failed, self._retry = say, 0, False
    self._request = hosts.Request('save again')

  def again(self, step: Step) -> bool:
    """Whether to save after this step though it is not due, since the last save failed.

    Raises:
      Mistake: what went wrong, if it did too often.
    """
    ended, failed = self._checkpoints.poll()
    if failed:
      self._request.ask(step.number, str(failed))
    elif ended:
      self._failed = 0
    if told := self._request.due(step.number):
      self._count(told)
      self._retry = True
    return self._retry

  def save(self, step: Step, state: dict, *, last: bool = False) -> float:
    """Starts to save, and returns the seconds for which it held training up.

    With `last` it waits until that went well, or gives up.
    """
    start = time.perf_counter()
    record = self._record | {'sequences': step.end, 'step': step.number}
    while True:
      try:
        if self._checkpoints.save(step.end, state, record):
          self._failed = 0
        self._retry = False
        if last:
          self._checkpoints.wait()
          hosts.meet()  # who ends first may take the others with it
        break
      except Mistake as e:
        if jax.process_count() > 1:  # the others wait for this one
          raise
        self._count(str(e))
        self._retry = True
        if not last:
          break
        time.sleep(PAUSE)
    return time.perf_counter() - start

  def _count(self, told: str) -> None:
    self._failed += 1
    self._say(f'FAILED   {told}; {self._failed} in a row, and at {self._most} the run ends')
    if self._failed >= self._most:
      raise Mistake(told)
