"""How often Python looks for garbage in reference cycles.

Of all that a program imports and traces until its first step an eighth is otherwise time in which
it looks, and finds none. A program that takes no steps goes on as it started.
"""

import gc

_before: list[tuple[int, int, int]] = []  # the thresholds that a program had


def look_rarely() -> None:
  """For a program that starts."""
  _before.append(gc.get_threshold())
  gc.set_threshold(500_000)


def look_as_usual() -> None:
  """For one that has started; nothing where it did not `look_rarely`."""
  if _before:
    gc.set_threshold(*_before.pop())
