"""Weights to and from the folders of Hugging Face: GPT-2, and GPT-Neo, whose layers alternate.

One table says what each of our arrays is called there and in what order its dims lie; both ways
read it, `hf_save` the other one. GPT-Neo's scores are not scaled, so its matrix of q is. Only
safetensors are read: a pickle is a program.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import einops
import jax
import numpy as np
from etils import epath

from gptjax import files
from gptjax.errors import mistake, needs, raise_all, told_as
from gptjax.sizes import Shape

INDEX = 'model.safetensors.index.json'
ONE = 'model.safetensors'
PREFIX = 'transformer.'  # of the model in one with a head
LARGEST = 2**20  # of a size: what is larger is no model
MOST_LAYERS = 10_000  # likewise
MOST_TOLD = 20  # mistakes of one folder
EPSILON = 1e-5  # of the layer norms: ours has no other
# Masks that older versions wrote beside the weights.
MASKS = r'h\.\d+\.attn\.(attention\.)?(masked_)?bias'


@dataclasses.dataclass(frozen=True)
class Row:
  """One of our arrays, or a part of it, and where it lies there."""

  ours: str  # its path in the params; a number at the end picks from its dim c
  theirs: str  # its name, {} being the layer
  dims: str  # 'theirs -> ours', or one that both have; letters as in sharding.py
  scaled: bool = False  # times d_head^-0.5 there, since scores are not

  @property
  def there(self) -> str:
    """The dims of the array there."""
    return self.dims.partition(' -> ')[0]

  @property
  def here(self) -> str:
    """Those of ours."""
    return self.dims.partition(' -> ')[2] or self.dims

  def size(self, shape: Shape) -> tuple[int, ...]:
    """Of the array there."""
    groups = re.findall(r'\(([^)]*)\)|(\w)', self.there)
    return tuple(math.prod(_sizes(shape, a or b).values()) for a, b in groups)

  def to_ours(self, theirs: np.ndarray, shape: Shape) -> np.ndarray:
    """Their array as ours is."""
    dims = f'{self.there} -> {self.here}'
    ours = einops.rearrange(theirs.astype(np.float32), dims, **_sizes(shape, self.here))
    return ours * np.float32(shape.d_head**0.5) if self.scaled else ours

  def to_theirs(self, ours: np.ndarray, shape: Shape) -> np.ndarray:
    """The inverse, exact where the root of d_head is a power of two."""
    if self.scaled:
      ours = ours * np.float32(shape.d_head**-0.5)
    return np.ascontiguousarray(einops.rearrange(ours, f'{self.here} -> {self.there}'))


def _sizes(shape: Shape, dims: str) -> dict[str, int]:
  every = {
    'c': 3,
    'd': shape.d_model,
    'h': shape.n_heads,
    'k': shape.d_head,
    'f': shape.d_ff,
    'l': shape.context,
    'v': shape.vocab_size,
  }
  return {dim: every[dim] for dim in dims.split()}


SAME = (
  Row('embed', 'wte.weight', 'v d'),
  Row('position', 'wpe.weight', 'l d'),
  Row('norm.scale', 'ln_f.weight', 'd'),
  Row('norm.bias', 'ln_f.bias', 'd'),
  Row('blocks.attn_norm.scale', 'h.{}.ln_1.weight', 'd'),
  Row('blocks.attn_norm.bias', 'h.{}.ln_1.bias', 'd'),
  Row('blocks.mlp_norm.scale', 'h.{}.ln_2.weight', 'd'),
  Row('blocks.mlp_norm.bias', 'h.{}.ln_2.bias', 'd'),
  Row('blocks.mlp.up_bias', 'h.{}.mlp.c_fc.bias', 'f'),
  Row('blocks.mlp.down_bias', 'h.{}.mlp.c_proj.bias', 'd'),
)
TABLES = {
  'gpt2': (
    *SAME,
    Row('blocks.attn.qkv', 'h.{}.attn.c_attn.weight', 'd (c h k) -> d c h k'),
    Row('blocks.attn.qkv_bias', 'h.{}.attn.c_attn.bias', '(c h k) -> c h k'),
    Row('blocks.attn.out', 'h.{}.attn.c_proj.weight', '(h k) d -> h k d'),
    Row('blocks.attn.out_bias', 'h.{}.attn.c_proj.bias', 'd'),
    Row('blocks.mlp.up', 'h.{}.mlp.c_fc.weight', 'd f'),
    Row('blocks.mlp.down', 'h.{}.mlp.c_proj.weight', 'f d'),
  ),
  'gpt_neo': (
    *SAME,
    Row('blocks.attn.qkv.0', 'h.{}.attn.attention.q_proj.weight', '(h k) d -> d h k', scaled=True),
    Row('blocks.attn.qkv.1', 'h.{}.attn.attention.k_proj.weight', '(h k) d -> d h k'),
    Row('blocks.attn.qkv.2', 'h.{}.attn.attention.v_proj.weight', '(h k) d -> d h k'),
    Row('blocks.attn.out', 'h.{}.attn.attention.out_proj.weight', 'd (h k) -> h k d'),
    Row('blocks.attn.out_bias', 'h.{}.attn.attention.out_proj.bias', 'd'),
    Row('blocks.mlp.up', 'h.{}.mlp.c_fc.weight', 'f d -> d f'),
    Row('blocks.mlp.down', 'h.{}.mlp.c_proj.weight', 'd f -> f d'),
  ),
}


# What a folder holds.


@dataclasses.dataclass(frozen=True)
class Folder:
  """A model of Hugging Face that was checked, of which nothing but names was read."""

  path: epath.Path
  family: str  # a name in TABLES
  shape: Shape
  holds: Mapping[str, tuple[epath.Path, str]]  # the file of each tensor, and its name there

  def read(self, row: Row, layer: int) -> np.ndarray:
    """What a row of the table says of a layer, as ours is."""
    import safetensors

    path, name = self.holds[row.theirs.format(layer)]
    with safetensors.safe_open(path, framework='numpy') as file:
      theirs = file.get_tensor(name)
    if not np.isfinite(theirs).all():
      fix = 'another copy, or another model'
      raise mistake(f'{path}: {name}', 'NaN or infinity', 'finite numbers', fix)
    return row.to_ours(theirs, self.shape)


def look(path: str) -> Folder:
  """The model in a folder, checked.

  Raises:
    Mistake: with all that is missing, too much or of another shape.
  """
  folder = files.folder(path)
  with needs('safetensors', 'hf'):
    import safetensors  # noqa: F401
  config = folder / 'config.json'
  with told_as(config, 'the config of a model', 'the folder that save_pretrained made', Exception):
    about = json.loads(config.read_text())
    family, shape = _described(about)
  holds, shapes = _tensors(folder)
  _check_tensors(folder, family, shape, shapes)
  return Folder(folder, family, shape, holds)


def _described(about: dict) -> tuple[str, Shape]:
  """The family and the shape that a config.json tells of."""
  family = about.get('model_type')
  if family not in TABLES:
    raise mistake('model_type', family, f'one of {", ".join(TABLES)}', 'a model of these')
  neo = family == 'gpt_neo'
  defaults = {
    'gpt2': {
      'scale_attn_weights': True,
      'scale_attn_by_inverse_layer_idx': False,
      'add_cross_attention': False,
    },
    'gpt_neo': {},
  }[family] | {'tie_word_embeddings': True, 'layer_norm_epsilon': EPSILON}
  mistakes = [
    mistake(name, about[name], wanted, 'a model without it')
    for name, wanted in defaults.items()
    if about.get(name, wanted) != wanted
  ]
  act = 'activation_function'
  if about.get(act, 'gelu_new') not in ('gelu_new', 'gelu_pytorch_tanh'):
    mistakes.append(mistake(act, about[act], 'gelu_new', 'a model with it'))
  raise_all(mistakes)
  names = (
    ('num_layers', 'hidden_size', 'num_heads', 'intermediate_size', 'max_position_embeddings')
    if neo
    else ('n_layer', 'n_embd', 'n_head', 'n_inner', 'n_positions')
  )
  optional = names[3]  # 4 times the width, if it is not told
  told = {name: about.get(name) for name in (*names, 'vocab_size', *['window_size'] * neo)}
  for name, size in told.items():
    most = MOST_LAYERS if name == names[0] else LARGEST
    if not (type(size) is int and 1 <= size <= most or name == optional and size is None):
      mistakes.append(mistake(name, size, f'a number from 1 to {most}', 'mending config.json'))
  raise_all(mistakes)
  N, D, H, F, T = (told[name] for name in names)
  if D % H:
    raise mistake(names[1], D, f'a multiple of {names[2]}, {H}', 'mending config.json')
  windows = [None]
  if neo:
    for group, times in about['attention_types']:
      named = isinstance(group, list) and group and set(group) <= {'global', 'local'}
      if not named or not isinstance(times, int) or times < 1:
        wanted = "lists of 'global' and 'local', and how often each comes"
        raise mistake('attention_types', [group, times], wanted, 'mending config.json')
    if (layers := sum(times * len(group) for group, times in about['attention_types'])) != N:
      got, wanted = f'{layers} layers', f'{N}, as num_layers says'
      raise mistake('attention_types', got, wanted, 'mending config.json')
    kinds = [kind for group, times in about['attention_types'] for kind in group * times]
    windows = [about['window_size'] if kind == 'local' else None for kind in kinds]
  sizes = N, D, H, D // H, F or 4 * D, T, about['vocab_size']
  return family, Shape(*sizes, period(windows), qkv_bias=not neo)


def period(windows: Sequence[int | None]) -> tuple[int | None, ...]:
  """The shortest beginning of which a sequence is repetitions, the last one perhaps cut."""
  lengths = range(1, len(windows) + 1)
  # As slices, since a wrong length is mostly seen at its first element.
  p = next(p for p in lengths if windows[p:] == windows[: len(windows) - p])
  return tuple(windows[:p])


def _tensors(folder):
  """The file and the shape of each tensor in a folder, by its name without what a head adds."""
  import safetensors

  there = files.names(folder)
  if INDEX in there:
    with told_as(folder / INDEX, 'an index of tensors', 'copying it again', Exception):
      names = sorted({*map(str, json.loads((folder / INDEX).read_text())['weight_map'].values())})
  else:
    names = [ONE]
  pickles = [name for name in there if re.search(r'\.(bin|pt|pth|pkl|ckpt)$', name)]
  if missing := [name for name in names if name not in there or '/' in name]:
    got = ', '.join(missing) + ' missing'
    if pickles:
      got = f'{pickles[0]}, a pickle: reading it would run whatever code is in it'
    fix = 'model.save_pretrained(folder), which writes safetensors'
    raise mistake(folder, got, 'safetensors', fix)
  holds, shapes = {}, {}
  for name in names:
    with told_as(folder / name, 'a whole file of safetensors', 'copying it again', Exception):
      with safetensors.safe_open(folder / name, framework='numpy') as file:
        for tensor in file.keys():
          part, plain = file.get_slice(tensor), tensor.removeprefix(PREFIX)
          holds[plain] = folder / name, tensor
          shapes[plain] = tuple(part.get_shape()), part.get_dtype()
  return holds, shapes


def _check_tensors(folder, family, shape, shapes):
  wanted = {row.theirs.format(layer): row.size(shape) for row, layer in rows(family, shape)}
  mistakes, fix = [], 'the folder as save_pretrained left it'
  for name in sorted(wanted.keys() - shapes.keys()):
    mistakes.append(mistake(f'{folder}: {name}', 'none', f'{wanted[name]}', fix))
  for name in sorted(shapes.keys() - wanted.keys()):
    if name != 'lm_head.weight' and not re.fullmatch(MASKS, name):
      mistakes.append(mistake(f'{folder}: {name}', shapes[name][0], 'no such tensor', fix))
  for name in sorted(wanted.keys() & shapes.keys()):
    size, dtype = shapes[name]
    if size != wanted[name] or not re.fullmatch(r'BF16|F(16|32|64)', dtype):
      got = f'{size} of {dtype}'
      mistakes.append(mistake(f'{folder}: {name}', got, f'{wanted[name]} of floats', fix))
  if len(mistakes) > MOST_TOLD:
    more = f'{len(mistakes) - MOST_TOLD + 1} more mistakes'
    mistakes[MOST_TOLD - 1 :] = [mistake(folder, more, 'the model of its config.json', fix)]
  raise_all(mistakes)


def rows(family: str, shape: Shape) -> Iterator[tuple[Row, int]]:
  """Each row of a family's table with each layer that it is of, or with 0."""
  for row in TABLES[family]:
    for layer in range(shape.n_layers if '{}' in row.theirs else 1):
      yield row, layer


# From there.


def load(folder: Folder, abstract: dict) -> dict:
  """The params of a model, as arrays that lie as those of an abstract state say.

  Each device's part is read from the layers that it has; no more than a tensor is held besides.
  """
  table = TABLES[folder.family]

  def array(path, leaf):
    ours = '.'.join(key.key for key in path)
    its = [row for row in table if row.ours == ours or re.fullmatch(rf'{ours}\.\d', row.ours)]
    part = functools.partial(_part, folder, its, leaf.shape, ours.startswith('blocks.'))
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

  return jax.tree_util.tree_map_with_path(array, abstract)


def _part(folder, its, size, stacked, index):
  """Of an array of ours of this size, what lies at an index."""

  def one(layer):
    parts = [folder.read(row, layer) for row in its]
    whole = parts[0] if its[0].ours[-1:].isalpha() else np.stack(parts, 1)
    # Rows of the padding of the vocabulary.
    more = [(0, want - have) for want, have in zip(size[stacked:], whole.shape, strict=True)]
    return np.pad(whole, more)

  if not stacked:
    return one(0)[index]
  layers = range(size[0])[index[0]]
  return np.stack([one(layer)[index[1:]] for layer in layers])
