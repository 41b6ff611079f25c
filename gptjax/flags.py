"""The door of every entry: `--config=file.py --config.key=value`, checked before anything runs."""

import argparse
import contextlib
import difflib
import importlib.util
import inspect
import os
import re
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from gptjax.errors import Mistake, mistake, raise_all, told_as, told_plainly

COMPILING = 'compiling'  # begins the names of threads that no program waits for when it fails


def run(
  main: Callable[..., None], doc: str | None, options: argparse.ArgumentParser | None = None
) -> None:
  """Parses the command line and calls `main(config)`; a Mistake ends it with exit code 2.

  `--help` prints `doc` and, given a config, its knobs. Flags that are no knobs are taken by
  `options`, if there is one, and what it makes of them is the second argument of `main`.
  """
  with _ending_at_once(), told_plainly():
    if {'--help', '-help', '-h'} & set(sys.argv[1:]):
      words = options.parse_known_args(sys.argv[1:])[1] if options else sys.argv[1:]
      print(_help([sys.argv[0], *words], doc))
      return
    own, words = options.parse_known_args(sys.argv[1:]) if options else (None, sys.argv[1:])
    config = parse([sys.argv[0], *words], vars(own) if options else ())
    # Libraries with absl flags of their own refuse to be used before these are parsed.
    flags.FLAGS(sys.argv[:1])
    main(config, own) if options else main(config)


@contextlib.contextmanager
def _ending_at_once() -> Iterator[None]:
  """Ends with a code at once, though a step still compiles: Python would wait for that thread."""
  try:
    yield
  except SystemExit as e:
    compiles = any(thread.name.startswith(COMPILING) for thread in threading.enumerate())
    if not (compiles and isinstance(e.code, int)):
      raise
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(e.code)


def parse(argv: Sequence[str], options: Collection[str] = ()) -> ConfigDict:
  """The locked config that a command line asks for. `argv[0]` is the program.

  Args:
    argv: without the program's own options.
    options: what these are called, to name the one that was perhaps meant.

  Raises Mistake for all that is wrong in it: no file, unknown keys, values of another type.
  """
  where, words = _config_file(argv[1:])
  config = _load(where)
  knobs, mistakes = dict(_knobs(config)), []
  while words:
    word = words.pop(0)
    override = re.match(r'--?(no)?config\.([^=]+)(=)?', word)
    if not override:
      mistakes.append(_stray(word, knobs, options))
      continue
    no, key, has_value = override.groups()
    whole = re.sub(r'(\[[^]]*\])+$', '', key)  # `key[0]` is an element of a tuple
    boolean = isinstance(knobs.get(whole), bool)
    given = [word]
    if not has_value and not boolean and words and not words[0].startswith('--'):
      given.append(words.pop(0))
    if isinstance(knobs.get(whole), str):
      given[-1] = _at_home(given[-1])
    if whole not in knobs or (no and not boolean):
      mistakes.append(_unknown(word, whole, knobs, options))
    elif wrong := _override(config, given, whole):
      mistakes.append(
        mistake(' '.join(given), wrong, _kind(config, whole), f'one like {knobs[whole]!r}')
      )
  raise_all(mistakes)
  return config


def _at_home(word: str) -> str:
  """A word with the home for `~` where that begins a path: a shell does it for whole words."""
  return re.sub(r'(^|[=,])~(?=/|$)', lambda found: found[1] + os.path.expanduser('~'), word)


def _config_file(words: Sequence[str]) -> tuple[str, list[str]]:
  """The value of --config, and the other words."""
  words, where = list(words), None
  for i, word in enumerate(words):
    if re.match(r'--?config=', word):
      where = word.split('=', 1)[1]
      del words[i]
    elif word in ('--config', '-config'):
      where = words[i + 1] if i + 1 < len(words) else ''
      del words[i : i + 2]
    if where is not None:
      break
  if not where:
    raise mistake('--config', 'none', 'a config file', '--config=configs/….py')
  return _at_home(where), words


def _load(where: str) -> ConfigDict:
  """`path` or `path:argument`: what get_config() in that file returns, locked."""
  path, *argument = where.split(':', 1)
  if not os.path.isfile(path):
    raise mistake('--config', f'{path}, which is not a file', 'a config file', 'another path')
  spec = importlib.util.spec_from_file_location('config', path)
  if spec is None:
    raise mistake('--config', path, 'a Python file (.py)', 'one of configs/')
  module = importlib.util.module_from_spec(spec)
  with told_as(f'--config={path}', 'a config file that Python can run', 'mending it', Exception):
    spec.loader.exec_module(module)
  if not hasattr(module, 'get_config'):
    raise mistake('--config', f'{path} without get_config()', 'one with it', 'one of configs/')
  try:
    inspect.signature(module.get_config).bind(*argument)
  except TypeError as e:
    got = f'{where} ({e})'
    raise mistake('--config', got, f'{path}{"" if argument else ":something"}', 'that') from e
  with told_as(f'--config={where}', 'a get_config() that runs', 'mending it', Exception):
    config = module.get_config(*argument)
  if not isinstance(config, ConfigDict):
    got = f'get_config() that returns {type(config).__name__}'
    raise mistake(f'--config={where}', got, 'an ml_collections.ConfigDict', 'one of configs/')
  return config.lock()


def _knobs(config: ConfigDict, prefix: str = '') -> Iterator[tuple[str, object]]:
  """Dotted keys of all leaves, with their values."""
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      yield from _knobs(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def _kind(config: ConfigDict, key: str) -> str:
  *groups, name = key.split('.')
  for group in groups:
    config = config[group]
  return config.get_type(name).__name__


def _override(config: ConfigDict, words: Sequence[str], key: str) -> str | None:
  """Sets one knob in place, parsed by ml_collections; says what is wrong if it cannot."""
  before = dict(_knobs(config))[key]
  values = flags.FlagValues()  # none of the process's own flags
  argv = ['', *words]
  try:
    config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=argv)
    values(argv)
  except (flags.Error, ValueError, TypeError, KeyError, IndexError, AttributeError) as e:
    text = ' '.join(map(str, e.args))  # absl gives some of them in pieces
    return text.removeprefix(f'flag {" ".join(words)}: ')
  after = dict(_knobs(config))[key]
  if isinstance(before, tuple) and before:
    # ml_collections takes any text for a tuple of texts.
    kinds = {type(v) for v in before}
    if not all(type(v) in kinds or (type(v) is int and float in kinds) for v in after):
      return repr(after)
  return None


def nearest(key: str, knobs: Sequence[str]) -> str | None:
  """The knob most likely meant by a key that is none of them, if any is near."""
  near = difflib.get_close_matches(key, knobs, 1)
  # A right name in the wrong place: `seed` for `data.seed`.
  ends = [k for k in knobs if k.split('.')[-1] == key.split('.')[-1]]
  return (near or ends or [None])[0]


def _unknown(word: str, key: str, knobs: dict[str, object], options: Collection[str]) -> Mistake:
  under = [k for k in knobs if k.startswith(key + '.')]  # a group of knobs, not a knob
  fix = ' or '.join(f'--config.{k}' for k in under) or _meant(key, knobs, options) or '--help'
  return mistake(word.split('=')[0], 'an unknown key', 'a key of the config', fix)


def _stray(word: str, knobs: dict[str, object], options: Collection[str]) -> Mistake:
  name = word.lstrip('-').split('=')[0]
  fix = _meant(name, knobs, options) or '--config.key=value'
  return mistake(word, 'an unknown argument', '--config.key=value', fix)


def _meant(name: str, knobs: dict[str, object], options: Collection[str]) -> str | None:
  """How the knob or option most likely meant is written, if any is near."""
  near = nearest(name, [*options, *knobs])
  return near and (f'--{near}' if near in options else f'--config.{near}')


def _help(argv: Sequence[str], doc: str | None) -> str:
  text = (doc or '').strip()
  words = [word for word in argv[1:] if word not in ('--help', '-help', '-h')]
  if not any(re.match(r'--?config(=|$)', word) for word in words):
    return f'{text}\n\nAdd --config=configs/….py to see its knobs.'
  config = parse([argv[0], *words])
  knobs = '\n'.join(f'  --config.{k}={v}' for k, v in _knobs(config))
  return f'{text}\n\nKnobs:\n{knobs}'
