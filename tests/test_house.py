"""The laws of the house that a machine can check, each with a piece of code that breaks it.

A law is a function from the syntax tree of a file to what breaks it there, a sentence each.
"""

import ast
import functools
import pathlib
import re
from collections.abc import Callable, Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# A module imports only from floors below its own. A half floor is a room that also uses others of
# its floor. `errors`, `files` and `flags`, tools of all, may be imported from everywhere.
FLOORS = {
  'errors': 0,
  'files': 0,
  'flags': 0.5,
  'sizes': 0,
  'integrity': 0.5,
  'preemption': 0,
  'watchdog': 0,
  'process': 0,
  'garbage': 0,
  'corruption': 1,
  'lease': 0.5,
  'goodput': 0,
  'saver': 2.5,
  'loop': 3.75,
  'compiler': 0,
  'hlo': 0,
  'machines': 0,
  'sharding': 0.5,
  'products': 0.75,
  'schedule': 0,
  'skips': 0.5,
  'stability': 0,
  'data.tokenizer': 0,
  'data.spool': 0,
  'data.features': 0,
  'data.token_files': 0,
  'data.mixture': 0,
  'data.engines': 0,
  'attention': 1,
  'cache': 1.5,
  'sampling': 1,
  'decode': 3.75,
  'beams': 3.8,
  'kernels': 1.5,
  'loss': 1,
  'optimizer': 1,
  'data.sources': 1,
  'journal': 0.5,
  'metrics': 1,
  'model': 2,
  'data.dataset': 1,
  'data.shards': 2,
  'data.loader': 2,
  'data.reading': 2.5,
  'data.corpora': 2.5,
  'pipeline': 2,
  'hosts': 0.5,
  'checkpoint': 2,
  'step': 3,
  'config': 3.5,
  'summary': 3.75,
  'search': 3.75,
  'estimate': 1.5,
  'ahead': 3.75,
  'memory': 3.75,
  'cost': 3.8,
  'plan_table': 3.9,
  'prepare': 4,
  'train': 4,
  'generate': 4,
  'export': 4,
  'trained': 3.75,
  'hf': 1,
  'hf_tokenizer': 1,
  'hf_save': 1.5,
  'fold': 1,
  'spoken': 1,
  'scoring': 3.75,
  'evaluate': 4,
  'report': 4,
  'plan': 4,
}
EVERYWHERE = {'errors', 'files', 'flags'}
ENTRIES = {name for name, floor in FLOORS.items() if floor == 4}
SEES_CONFIGS = ENTRIES | {'flags', 'config'}
# They know letters only, no machine.
LETTERS_ONLY = {'model', 'attention', 'kernels', 'loss', 'products'}
MESH_AXES = {'data', 'fsdp', 'tensor', 'stage'}
ASKS_FOR_DEVICES = {
  'devices',
  'local_devices',
  'device_count',
  'local_device_count',
  'process_count',
  'process_index',
  'default_backend',
}

# Test files that belong to no one module, and why they exist; modules that need no file of theirs.
TESTS_OF_NO_MODULE = {
  'against': 'benchmarks/against.py and contender.py',
  'benchmarks': 'benchmarks/',
  'budget': 'what a compiled step costs',
  'bucket': 'workdirs in a bucket',
  'curve': 'benchmarks/curve.py',
  'gpu_results': 'benchmarks/gpu.sh and gpu_results.py',
  'house': 'the laws',
  'launch': 'the scripts of launch/',
  'recovery': 'what breaks while a run runs',
  'torch_gpt': 'benchmarks/torch_gpt.py',
}
MODULES_WITHOUT_TEST = set()

SKIPPED_FOLDERS = {'data', 'runs', 'build', 'wandb'}  # of the root: what .gitignore leaves out
BAD_NAMES = {'utils', 'util', 'helpers', 'misc', 'common'}


# What there is.


def package_files() -> dict[str, pathlib.Path]:
  """The modules of gptjax by their dotted names within it."""
  found = {}
  for path in sorted((ROOT / 'gptjax').rglob('*.py')):
    if path.name != '__init__.py':
      found['.'.join(path.relative_to(ROOT / 'gptjax').with_suffix('').parts)] = path
  return found


MODULES = package_files()


def all_files() -> Iterator[pathlib.Path]:
  """Every text file of the repository that is written by hand."""
  for top in sorted(ROOT.iterdir()):
    hidden = top.name.startswith('.') and top.name not in ('.ci', '.gitignore')
    if hidden or top.name in SKIPPED_FOLDERS or top.suffix == '.egg-info':
      continue
    for path in sorted(top.rglob('*')) if top.is_dir() else [top]:
      if path.is_file() and path.suffix not in ('.pyc', '.png', '.gz', '.zst', '.model'):
        yield path


@functools.cache
def tree_of(path: pathlib.Path) -> ast.Module:
  return ast.parse(path.read_text(), str(path))


# The laws.


def imports_from_below(module: str, tree: ast.Module) -> list[str]:
  """Imports of gptjax's own modules come from floors below, and entries import no entry."""
  broken = []
  for name in own_imports(tree):
    if name in EVERYWHERE:
      continue
    if name not in FLOORS:
      broken.append(f'imports {name}, which has no floor')
    elif FLOORS[name] >= FLOORS[module]:
      broken.append(f'imports {name} of floor {FLOORS[name]} from floor {FLOORS[module]}')
  return broken


def own_imports(tree: ast.Module) -> Iterator[str]:
  """The modules of gptjax that a file imports, by their dotted names within it."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
      yield from (n.removeprefix('gptjax.') for n in names if n.split('.')[0] == 'gptjax')
    elif isinstance(node, ast.ImportFrom) and node.level:
      yield '.' * node.level + (node.module or '')  # a relative import is on no floor
    elif isinstance(node, ast.ImportFrom) and node.module.split('.')[0] == 'gptjax':
      inside = node.module.removeprefix('gptjax').lstrip('.')
      for alias in node.names:
        # `from gptjax.data import loader` names a module, `from gptjax.config import Run` does not.
        yield inside if inside in FLOORS else f'{inside}.{alias.name}'.lstrip('.')


def configs_end_at_the_door(module: str, tree: ast.Module) -> list[str]:
  """Only entries, flags and config know what a ConfigDict is."""
  if module in SEES_CONFIGS:
    return []
  found = names_in(tree) & {'ConfigDict', 'FrozenConfigDict', 'ml_collections', 'config_dict'}
  return [f'mentions {name}' for name in sorted(found)]


def knobs_have_no_default(module: str, tree: ast.Module) -> list[str]:
  """No `.get(name, default)` and no `getattr(config, name, default)` where configs are seen."""
  broken = []
  for call in calls_in(tree):
    get = isinstance(call.func, ast.Attribute) and call.func.attr == 'get'
    if module in SEES_CONFIGS and get and len(call.args) + len(call.keywords) > 1:
      broken.append(f'line {call.lineno}: {ast.unparse(call)}')
    attribute = isinstance(call.func, ast.Name) and call.func.id == 'getattr'
    if attribute and len(call.args) > 2 and re.search('config|cfg', ast.unparse(call.args[0])):
      broken.append(f'line {call.lineno}: {ast.unparse(call)}')
  return broken


def letters_know_no_machine(module: str, tree: ast.Module) -> list[str]:
  """No mesh axis by name and no question about devices where only letters are known."""
  if module not in LETTERS_ONLY:
    return []
  texts = {node.value for node in constants_in(tree)}
  axes = [f'names the mesh axis {axis!r}' for axis in sorted(texts & MESH_AXES)]
  asked = {
    node.attr
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == 'jax'
  }
  asked |= {
    alias.name
    for node in ast.walk(tree)
    if isinstance(node, ast.ImportFrom) and node.module == 'jax'
    for alias in node.names
  }
  return axes + [f'asks for jax.{name}' for name in sorted(asked & ASKS_FOR_DEVICES)]


def nothing_is_unpickled(module: str, tree: ast.Module) -> list[str]:
  """No pickle: a checkpoint or corpus from elsewhere must not be able to run code."""
  broken = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      imported = [alias.name for alias in node.names]
    else:
      imported = [node.module] if isinstance(node, ast.ImportFrom) else []
    pickles = {'pickle', 'cloudpickle', 'dill', 'joblib', 'shelve', 'marshal'}
    broken += [f'imports {name}' for name in imported if name and name.split('.')[0] in pickles]
    if isinstance(node, ast.keyword) and node.arg == 'allow_pickle':
      if not (isinstance(node.value, ast.Constant) and node.value.value is False):
        broken.append('allow_pickle')
  return broken


def keywords_are_not_passed_through(module: str, tree: ast.Module) -> list[str]:
  """No function hands its own **kwargs to another: what it takes is written in its head."""
  broken = []
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and node.args.kwarg:
      name = node.args.kwarg.arg
      broken += [
        f'line {call.lineno}: passes **{name} on'
        for call in calls_in(node)
        for keyword in call.keywords
        if keyword.arg is None and isinstance(keyword.value, ast.Name) and keyword.value.id == name
      ]
  return broken


def names_in(tree: ast.AST) -> set[str]:
  """All identifiers of a file, imported ones split at their dots."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Name):
      found.add(node.id)
    elif isinstance(node, ast.Attribute):
      found.add(node.attr)
    elif isinstance(node, ast.Import | ast.ImportFrom):
      dotted = [alias.name for alias in node.names] + [getattr(node, 'module', None) or '']
      found.update(part for name in dotted for part in name.split('.'))
  return found


def calls_in(tree: ast.AST) -> Iterator[ast.Call]:
  return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def constants_in(tree: ast.AST) -> Iterator[ast.Constant]:
  """Strings, without docstrings and other bare ones."""
  bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
  for node in ast.walk(tree):
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
      yield node


PATHS = re.compile(r'(?<![\w.$~{}/-])/(?:home|root|Users|work|tmp|scratch)/\w|[A-Z]:\\Users')


def machine_paths(text: str) -> list[str]:
  """Absolute paths of somebody's machine."""
  return [f'{match[0]!r}' for match in PATHS.finditer(text)]


def untested(modules: set[str], tests: set[str]) -> list[str]:
  """Every module has a test of its name, every test a module; `data.x` is tested in test_x."""
  wanted = {name.split('.')[-1]: name for name in modules}
  missing = wanted.keys() - tests - MODULES_WITHOUT_TEST
  homeless = tests - wanted.keys() - TESTS_OF_NO_MODULE.keys()
  broken = [f'{wanted[name]} has no tests/test_{name}.py' for name in sorted(missing)]
  return broken + [f'tests/test_{name}.py belongs to no module' for name in sorted(homeless)]


def misnamed(names: set[str]) -> list[str]:
  """A module that is named after nothing collects everything."""
  return sorted(name for name in names if name.split('.')[-1] in BAD_NAMES)


Law = Callable[[str, ast.Module], list[str]]
LAWS_OF_MODULES: list[Law] = [
  imports_from_below,
  configs_end_at_the_door,
  knobs_have_no_default,
  letters_know_no_machine,
  nothing_is_unpickled,
  keywords_are_not_passed_through,
]


# The house keeps them.


def test_every_module_has_a_floor():
  assert sorted(MODULES.keys() - FLOORS.keys()) == []


def test_the_laws_find_the_files_they_are_about():
  assert LETTERS_ONLY <= MODULES.keys()
  assert EVERYWHERE <= MODULES.keys()
  assert {'train', 'prepare', 'report'} <= ENTRIES & MODULES.keys()
  assert ROOT / 'tests' / 'test_house.py' in set(all_files())


@pytest.mark.parametrize('law', LAWS_OF_MODULES, ids=lambda law: law.__name__)
def test_every_module_keeps_the_law(law):
  known = {name: path for name, path in MODULES.items() if name in FLOORS}
  broken = {name: law(name, tree_of(path)) for name, path in known.items()}
  assert {name: why for name, why in broken.items() if why} == {}


def test_no_python_file_unpickles():
  # But for tests: they may see whether an object of their own can travel to a worker process.
  tests = ROOT / 'tests'
  files = [p for p in all_files() if p.suffix == '.py' and tests not in p.parents]
  broken = {str(p.relative_to(ROOT)): nothing_is_unpickled('', tree_of(p)) for p in files}
  assert {name: why for name, why in broken.items() if why} == {}


def test_no_python_file_is_named_after_nothing():
  assert misnamed({path.stem for path in all_files() if path.suffix == '.py'}) == []


def test_no_file_names_a_path_of_a_machine():
  broken = {str(p.relative_to(ROOT)): machine_paths(p.read_text()) for p in all_files()}
  assert {name: paths for name, paths in broken.items() if paths} == {}


def test_tests_and_modules_match():
  tests = {path.stem.removeprefix('test_') for path in (ROOT / 'tests').glob('test_*.py')}
  assert untested(set(MODULES), tests) == []


def test_no_two_modules_share_the_name_of_their_tests():
  last = [name.split('.')[-1] for name in MODULES]
  assert sorted(last) == sorted(set(last))


# The laws can be broken.


@pytest.mark.parametrize(
  ('law', 'module', 'code'),
  [
    (imports_from_below, 'sizes', 'from gptjax import model'),
    (imports_from_below, 'sizes', 'import gptjax.model'),
    (imports_from_below, 'sizes', 'def f():\n  from gptjax.model import GPT'),
    (imports_from_below, 'sizes', 'from gptjax.data import loader'),
    (imports_from_below, 'sizes', 'from gptjax.data.loader import stream'),
    (imports_from_below, 'model', 'from gptjax import checkpoint'),  # the same floor
    (imports_from_below, 'train', 'from gptjax import step, plan'),  # an entry from an entry
    (imports_from_below, 'train', 'from gptjax.prepare import main'),
    (imports_from_below, 'train', 'from gptjax import nowhere'),
    (imports_from_below, 'train', 'from . import step'),
    (configs_end_at_the_door, 'model', 'from ml_collections import ConfigDict'),
    (configs_end_at_the_door, 'step', 'import ml_collections'),
    (configs_end_at_the_door, 'step', 'def f(c: "x", d: config_dict.ConfigDict): ...'),
    (knobs_have_no_default, 'train', 'x = config.lr.get("peak", 1e-4)'),
    (knobs_have_no_default, 'config', 'x = c.get("peak", default=1e-4)'),
    (knobs_have_no_default, 'train', 'x = getattr(config.lr, "peak", None)'),
    (letters_know_no_machine, 'model', 'spec = P("data", None)'),
    (letters_know_no_machine, 'attention', 'f(axis_name="tensor")'),
    (letters_know_no_machine, 'loss', 'n = len(jax.devices())'),
    (letters_know_no_machine, 'loss', 'from jax import local_devices'),
    (letters_know_no_machine, 'attention', 'if jax.default_backend() == "tpu": ...'),
    (nothing_is_unpickled, 'checkpoint', 'import pickle'),
    (nothing_is_unpickled, 'checkpoint', 'from pickle import loads'),
    (nothing_is_unpickled, 'checkpoint', 'x = np.load(f, allow_pickle=True)'),
    (keywords_are_not_passed_through, 'model', 'def f(**kwargs): return g(**kwargs)'),
    (keywords_are_not_passed_through, 'model', 'f = lambda x, **more: g(x, **more)'),
    (keywords_are_not_passed_through, 'model', 'def f(**o):\n  def h(): g(1, **o)\n  h()'),
  ],
)
def test_the_law_sees_what_breaks_it(law, module, code):
  assert law(module, ast.parse(code))


@pytest.mark.parametrize(
  ('law', 'module', 'code'),
  [
    (imports_from_below, 'model', 'from gptjax import sizes, errors\nfrom gptjax.loss import f'),
    (imports_from_below, 'train', 'import jax\nfrom gptjax.data import loader, shards'),
    (imports_from_below, 'sizes', 'from gptjax.errors import mistake'),
    (configs_end_at_the_door, 'model', '"""No ConfigDict here."""'),
    (configs_end_at_the_door, 'train', 'from ml_collections import ConfigDict'),
    (knobs_have_no_default, 'train', 'x = config.lr.peak\ny = record.get("mfu")'),
    (letters_know_no_machine, 'model', '"""data"""\nf("bld", jax.nn.gelu(x))'),
    (letters_know_no_machine, 'step', 'P("data")'),
    (nothing_is_unpickled, 'checkpoint', 'x = np.load(f, allow_pickle=False)'),
    (keywords_are_not_passed_through, 'model', 'f(**settings)'),
    (keywords_are_not_passed_through, 'model', 'def f(**names): return dict(names)'),
  ],
)
def test_the_law_lets_the_rest_be(law, module, code):
  assert law(module, ast.parse(code)) == []


def test_paths_of_a_machine_are_seen_and_others_are_not():
  slash = '/'  # so that this file does not break the law itself
  for path in ('home/me', 'root/x', 'tmp/x', 'Users/me', 'work/x'):
    assert machine_paths(f'see {slash}{path}'), path
    assert machine_paths(f"open('{slash}{path}/file')"), path
    assert not machine_paths(f'https://host{slash}{path}'), path
    assert not machine_paths(f'gs://bucket{slash}{path}'), path
    assert not machine_paths(f'$HOME{slash}{path}'), path
  assert not machine_paths('#!/usr/bin/env bash')


def test_a_module_without_test_and_a_test_without_module_are_seen():
  assert untested({'a', 'data.b'}, {'a', 'b'}) == []
  assert untested({'a', 'data.b'}, {'a'}) == ['data.b has no tests/test_b.py']
  assert untested({'a'}, {'a', 'b'}) == ['tests/test_b.py belongs to no module']


def test_names_of_nothing_are_seen():
  assert misnamed({'model', 'utils', 'data.helpers'}) == ['data.helpers', 'utils']
