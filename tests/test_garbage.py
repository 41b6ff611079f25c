"""A program looks for garbage rarely until it has started; who imports gptjax decides itself."""

import pytest


@pytest.mark.parametrize('first, rarely', [('-m', True), ('a/program', False)])
def test_a_program_looks_rarely_until_it_has_started(run_python, first, rarely):
  code = f"""
import gc, sys
sys.argv[0], before = {first!r}, gc.get_threshold()
from gptjax import garbage
print(gc.get_threshold()[0] > 10 * before[0])
garbage.look_as_usual()
print(gc.get_threshold() == before)
gc.set_threshold(5)
garbage.look_as_usual()
print(gc.get_threshold()[0] == 5)
"""
  told = run_python(code, timeout=60).stdout.split()
  assert told == [str(rarely), 'True', 'True']
