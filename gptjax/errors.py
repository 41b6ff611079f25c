"""What a user can cause, told in one shape: what, got, wanted, try."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence


class Mistake(ValueError):
  """A mistake in what a user gave, or several. Entries print its message without a traceback."""

  several: Sequence['Mistake'] = ()


def mistake(what: str, got: object, wanted: object, fix: str) -> Mistake:
  """One mistake, ready to raise: `what: got …, wanted …; try …`."""
  return Mistake(f'{what}: got {got}, wanted {wanted}; try {fix}')


def raise_all(mistakes: Sequence[Mistake]) -> None:
  """Raises all of them as one Mistake, a line each; does nothing if there is none."""
  mistakes = [one for m in mistakes for one in m.several or (m,)]
  if len(mistakes) == 1:
    raise mistakes[0]
  if mistakes:
    lines = '\n'.join(f'  {i}. {m}' for i, m in enumerate(mistakes, 1))
    together = Mistake(f'{len(mistakes)} mistakes:\n{lines}')
    together.several = mistakes
    raise together


@contextlib.contextmanager
def told_as(what: object, wanted: object, fix: str, *kinds: type[Exception]) -> Iterator[None]:
  """Turns an exception of these kinds, raised by what is not ours, into a Mistake that quotes it.

  With `Exception` for files in a library's format: what it raises for a damaged one is its secret.
  """
  try:
    yield
  except Mistake:
    raise
  except kinds as e:
    lines = f'{e}'.strip().splitlines()
    told = lines[-1:] if lines[:1] == ['Traceback (most recent call last):'] else lines[:1]
    raise mistake(what, ': '.join([type(e).__name__, *told])[:300], wanted, fix) from e


@contextlib.contextmanager
def needs(package: str, extra: str) -> Iterator[None]:
  """Turns the failed import of a package that an extra brings into a Mistake."""
  try:
    yield
  except ImportError:
    raise Mistake(f"{package} is not installed; try pip install -e '.[{extra}]'") from None


@contextlib.contextmanager
def told_plainly() -> Iterator[None]:
  """For the door of an entry: ends it without a traceback.

  A Mistake is a message on stderr and exit code 2, Ctrl-C is 130, and a reader of the output that
  went away, as `head` does, 141.
  """
  # What a terminal cannot show is no reason to lose a run, or its result.
  if hasattr(sys.stdout, 'reconfigure'):  # not in a notebook
    sys.stdout.reconfigure(errors='backslashreplace')
  try:
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as while all was imported
      signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Not sys.exit: a thread of XLA's that still compiles crashes in a dying interpreter.
    os._exit(130)
  except Mistake as e:
    print(f'error: {e}', file=sys.stderr)
    sys.exit(2)
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)
