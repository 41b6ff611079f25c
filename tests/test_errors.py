"""What a user reads when something is wrong."""

import pathlib
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.errors import Mistake, mistake, raise_all, told_as, told_plainly

ROOT = pathlib.Path(__file__).parents[1]
texts = st.text(min_size=1)


@given(what=texts, got=texts | st.integers(), wanted=texts, fix=texts)
def test_a_mistake_says_what_got_wanted_and_try_in_this_order(what, got, wanted, fix):
  assert str(mistake(what, got, wanted, fix)) == f'{what}: got {got}, wanted {wanted}; try {fix}'


def test_a_mistake_is_a_value_error():
  assert issubclass(Mistake, ValueError)


def test_no_mistakes_raise_nothing():
  raise_all([])


def test_one_mistake_is_raised_as_it_is():
  one = Mistake('alone')
  with pytest.raises(Mistake) as caught:
    raise_all([one])
  assert caught.value is one


@given(st.lists(st.text(st.characters(categories=('L', 'N'))), min_size=2, max_size=30))
def test_many_mistakes_are_told_all_at_once_in_order(messages):
  with pytest.raises(Mistake) as caught:
    raise_all([Mistake(message) for message in messages])
  head, *lines = str(caught.value).split('\n')
  assert head == f'{len(messages)} mistakes:'
  assert [line.strip() for line in lines] == [
    f'{i}. {message}'.strip() for i, message in enumerate(messages, 1)
  ]


def test_mistakes_of_several_layers_are_one_list():
  with pytest.raises(Mistake) as inner:
    raise_all([Mistake('a'), Mistake('b')])
  with pytest.raises(Mistake) as outer:
    raise_all([inner.value, Mistake('c')])
  assert str(outer.value) == '3 mistakes:\n  1. a\n  2. b\n  3. c'


def test_the_door_tells_a_mistake_on_stderr_and_exits_with_2(capsys):
  with pytest.raises(SystemExit) as left, told_plainly():
    raise Mistake('no such thing')
  assert left.value.code == 2
  assert capsys.readouterr() == ('', 'error: no such thing\n')


def test_the_door_lets_other_errors_through():
  with pytest.raises(ValueError, match='ours') as caught, told_plainly():
    raise ValueError('ours')
  assert not isinstance(caught.value, Mistake)


def test_a_program_at_the_door_shows_no_traceback(run_python):
  code = 'from gptjax.errors import *\nwith told_plainly(): raise Mistake("no such thing")'
  done = run_python(code, timeout=120, code=2)
  assert done.stderr == 'error: no such thing\n'


def test_what_a_library_raises_is_quoted_in_one_line():
  with pytest.raises(Mistake) as caught, told_as('a.json', 'JSON', 'mending it', ValueError):
    raise UnicodeError('first\nsecond')
  assert str(caught.value) == 'a.json: got UnicodeError: first, wanted JSON; try mending it'
  assert isinstance(caught.value.__cause__, UnicodeError)
  with (
    pytest.raises(Mistake, match='got OSError: the end, wanted'),
    told_as('a', 'b', 'c', OSError),
  ):
    raise OSError('Traceback (most recent call last):\n  of another process\nthe end')
  with pytest.raises(Mistake, match='got KeyError, wanted'), told_as('a', 'b', 'c', Exception):
    raise KeyError


def test_a_mistake_or_another_kind_of_error_is_not_quoted():
  with pytest.raises(Mistake, match='^mine$'), told_as('a', 'b', 'c', Exception):
    raise Mistake('mine')
  with pytest.raises(KeyError), told_as('a', 'b', 'c', OSError):
    raise KeyError


def test_what_a_terminal_cannot_show_ends_no_program(run_python):
  code = "from gptjax.errors import *\nwith told_plainly(): print('5 … 9')"
  env = {'PYTHONIOENCODING': 'ascii'}
  assert run_python(code, timeout=120, env=env).stdout == '5 \\u2026 9\n'


def test_a_reader_that_goes_away_is_no_error():
  code = "from gptjax.errors import *\nwith told_plainly():\n  while True: print('x' * 99)"
  with subprocess.Popen(
    [sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
  ) as process:
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b''
  assert process.returncode == 141


@pytest.mark.parametrize('first, told', [('-m', ''), ('a/program', 'KeyboardInterrupt')])
def test_ctrl_c_ends_a_program_that_still_imports(run_python, first, told):
  """Without an exception, of which an extension may crash; who imports gptjax decides itself."""
  interrupt = 'signal.raise_signal(signal.SIGINT)'
  program = f'import signal, sys\nsys.argv[0] = {first!r}\nimport gptjax\n{interrupt}'
  done = run_python(program, timeout=60, code=-signal.SIGINT)
  assert done.stderr.strip().endswith(told) and bool(done.stderr) == bool(told)


@pytest.mark.parametrize('first', ['-m', 'a/program'])
def test_ctrl_c_at_the_door_is_told(run_python, first):
  program = f"""
import signal, sys
sys.argv[0] = {first!r}
from gptjax.errors import *
with told_plainly():
  try:
    signal.raise_signal(signal.SIGINT)
  finally:
    print('tidied')
"""
  done = run_python(program, timeout=60, code=130)
  assert (done.stdout, done.stderr) == ('tidied\n', 'interrupted\n')


def test_who_is_not_to_hear_ctrl_c_does_not(run_python):
  """As a shell's `program &` wants it."""
  program = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.argv[0] = '-m'
from gptjax.errors import *
with told_plainly():
  signal.raise_signal(signal.SIGINT)
  print('goes on')
"""
  assert run_python(program, timeout=60).stdout == 'goes on\n'
