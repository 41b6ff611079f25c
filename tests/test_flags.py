"""The command line: what it sets, and what it says of mistakes."""

import os
import pathlib
import subprocess
import sys

import pytest

from gptjax import flags
from gptjax.errors import Mistake

CONFIG = """
from ml_collections import ConfigDict, config_dict

def get_config(size='small'):
  c = ConfigDict()
  c.source = 'here'
  c.size = size
  c.layers = 3
  c.rate = 0.5
  c.on = True
  c.pair = (1, 2)
  c.name = config_dict.placeholder(str)
  c.batch = ConfigDict({'sequences': 8, 'ramp': ConfigDict({'tokens': 4})})
  return c
"""


@pytest.fixture
def config_file(tmp_path):
  path = tmp_path / 'config.py'
  path.write_text(CONFIG)
  return str(path)


def parse(config_file, *words):
  return flags.parse(['program', f'--config={config_file}', *words])


def test_values(config_file):
  c = parse(
    config_file,
    '--config.source=a=b c',
    '--config.layers',
    '-7',
    '--config.rate=1',
    '--noconfig.on',
    '--config.pair=(3,4)',
    '--config.name=x',
    '--config.batch.ramp.tokens=5',
  )
  assert (c.source, c.layers, c.rate, c.on, c.pair, c.name) == (
    'a=b c',
    -7,
    1.0,
    False,
    (3, 4),
    'x',
  )
  assert c.batch.ramp.tokens == 5 and c.batch.sequences == 8 and c.size == 'small'


@pytest.mark.parametrize(
  'given, want',
  [('~/a', '/me/a'), ('~', '/me'), ('a=~/b,~/c=2', 'a=/me/b,/me/c=2')]
  + [(name, name) for name in ('a~', 'a/~/b', '~a', 'x ~/b')],
)
def test_home_is_home(config_file, monkeypatch, given, want):
  monkeypatch.setenv('HOME', '/me')
  assert parse(config_file, f'--config.source={given}').source == want
  assert parse(config_file, '--config.source', given).source == want


def test_as_the_file_says_and_locked(config_file):
  c = parse(config_file)
  assert c.layers == 3 and c.on and c.name is None
  with pytest.raises(AttributeError):
    c.new = 1


def test_config_argument_and_order(config_file):
  c = flags.parse(['p', '--config.layers=4', '--config', f'{config_file}:large', '--config.on'])
  assert c.size == 'large' and c.layers == 4 and c.on


def test_last_value_wins(config_file):
  assert parse(config_file, '--config.layers=4', '--config.layers=5').layers == 5


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['--config.sorce=x'], '--config.sorce: got an unknown key.*try --config.source'),
    (['--config.batch.sequence=4'], 'unknown key.*try --config.batch.sequences'),
    (['--config.sequences=4'], 'unknown key.*try --config.batch.sequences'),
    (['--config.batch=4'], 'unknown key.*--config.batch.ramp.tokens or --config.batch.sequences'),
    (['--config.zzz=4'], 'unknown key.*try --help'),
    (['--noconfig.layers'], 'unknown key'),
    (['--config.layers=x'], r"--config.layers=x: got .*'x', wanted int; try one like 3"),
    (['--config.layers=3.5'], 'wanted int'),
    (['--config.layers'], 'wanted int'),
    (['--config.rate=fast'], 'wanted float; try one like 0.5'),
    (['--config.on=perhaps'], 'wanted bool'),
    (['--config.pair=a,b'], 'wanted tuple'),
    (['--config.pair=(1'], 'wanted tuple'),
    (['--layers=4'], '--layers=4: got an unknown argument.*try --config.layers'),
    (['stray'], 'stray: got an unknown argument'),
  ],
)
def test_mistakes(config_file, words, message):
  with pytest.raises(Mistake, match=message):
    parse(config_file, *words)


def test_all_mistakes_at_once(config_file):
  with pytest.raises(Mistake, match='3 mistakes:(.|\n)*sorce(.|\n)*layers=x(.|\n)*stray'):
    parse(config_file, '--config.sorce=x', '--config.on', '--config.layers=x', 'stray')


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    ([], '--config: got none'),
    (['--config'], '--config: got none'),
    (['--config='], '--config: got none'),
    (['--config=nowhere.py'], 'nowhere.py, which is not a file'),
    (['--config=README'], 'wanted a Python file'),
    (['--config=empty.py'], r'empty.py without get_config\(\)'),
    (['--config=plain.py:large'], r'plain.py:large \(too many positional arguments\)'),
    (['--config=plain.py'], r'plain.py: got get_config\(\) that returns int'),
    (['--config=broken.py'], r'broken.py: got SyntaxError: .*broken.py, line 2\)'),
    (['--config=lost.py'], 'lost.py: got ModuleNotFoundError: .*nowhere'),
    (['--config=raises.py'], r'raises.py: got KeyError.*, wanted a get_config\(\) that runs'),
  ],
)
def test_no_config(tmp_path, monkeypatch, words, message):
  monkeypatch.chdir(tmp_path)
  for name, text in {
    'README': '',
    'empty.py': '',
    'plain.py': 'def get_config(): return 1',
    'broken.py': '\ndef get_config(:',
    'lost.py': 'import nowhere',
    'raises.py': 'def get_config(): return {}["x"]',
  }.items():
    (tmp_path / name).write_text(text)
  with pytest.raises(Mistake, match=message):
    flags.parse(['program', *words])


def entry(tmp_path, *words):
  """A real entry, run."""
  path = tmp_path / 'entry.py'
  path.write_text(
    '"""Says the layers."""\n'
    'import absl.flags\n'
    'from gptjax import errors, flags\n'
    'def main(config):\n'
    '  if config.layers < 0: raise errors.mistake("layers", config.layers, "some", "3")\n'
    '  assert absl.flags.FLAGS.is_parsed()\n'  # some libraries insist
    '  print("layers", 10 // config.layers)\n'
    'flags.run(main, __doc__)\n'
  )
  env = os.environ | {'PYTHONPATH': str(pathlib.Path(flags.__file__).parents[1])}
  return subprocess.run([sys.executable, path, *words], capture_output=True, text=True, env=env)


def test_entry(tmp_path, config_file):
  done = entry(tmp_path, f'--config={config_file}', '--config.layers=5')
  assert (done.returncode, done.stdout) == (0, 'layers 2\n')
  for words in (['--config.layer=5'], ['--config.layers=-1']):
    failed = entry(tmp_path, f'--config={config_file}', *words)
    assert failed.returncode == 2 and failed.stderr.startswith('error: ')
    assert 'Traceback' not in failed.stderr and 'layers' in failed.stderr
  broken = entry(tmp_path, f'--config={config_file}', '--config.layers=0')
  assert broken.returncode == 1 and 'ZeroDivisionError' in broken.stderr


COMPILES = """
import time
from concurrent import futures
from gptjax import flags
from gptjax.errors import Mistake

def main(config):
  futures.ThreadPoolExecutor(1, flags.COMPILING).submit(time.sleep, 600)
  print('begun')
  raise Mistake('no room')

flags.run(main, '')
"""


def test_a_mistake_does_not_wait_for_what_still_compiles(run_python, config_file):
  done = run_python(['-c', COMPILES, f'--config={config_file}'], timeout=60, code=2)
  assert (done.stdout, done.stderr) == ('begun\n', 'error: no room\n')


def test_help(tmp_path, config_file):
  done = entry(tmp_path, '--help')
  assert done.returncode == 0 and 'Says the layers.' in done.stdout
  done = entry(tmp_path, f'--config={config_file}', '--config.rate=2', '--help')
  assert '--config.rate=2.0' in done.stdout and '--config.batch.ramp.tokens=4' in done.stdout
