"""Weights to and from the folders of Hugging Face: GPT-2, and GPT-Neo, whose layers alternate.

One table says what each of our arrays is called there and in what order its dims lie; both ways
read it. GPT-Neo's scores are not scaled and its q, k and v have no biases: what it lacks is folded
into what it has. Only safetensors are read: a pickle is a program.
"""

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

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
SHARD_BYTES = 5 * 10**9
EPSILON = 1e-5  # of the layer norms: ours has no other
TOLERANCE = 1e-4  # of logits, where something was folded
# Masks that older versions wrote beside the weights.
MASKS = r'h\.\d+\.attn\.(attention\.)?(masked_)?bias'


@dataclasses.dataclass(frozen=True)
class Row:
  """One of our arrays, or a part of it, and where it lies there."""

  ours: str  # its path in the params; a number at the end picks from its dim c
  theirs: str  # its name, {} being the layer
  dims: str  # 'theirs -> ours', or one that both have; letters as in sharding.py
  scaled: bool = False  # times d_head^-0.5 there, since scores are not


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
      theirs = file.get_tensor(name).astype(np.float32)
    there, here = _both(row.dims)
    ours = einops.rearrange(theirs, f'{there} -> {here}', **_sizes(self.shape, here))
    return ours * np.float32(self.shape.d_head**0.5) if row.scaled else ours


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
  _check_tensors(folder, TABLES[family], shape, shapes)
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
  N, D, H, F, T = (about.get(name) for name in names)
  windows = [None]
  if neo:
    kinds = [kind for group, times in about['attention_types'] for kind in group * times]
    windows = [about['window_size'] if kind == 'local' else None for kind in kinds]
    if len(windows) != N:
      got = f'{len(windows)} layers'
      raise mistake('attention_types', got, f'{N}, as num_layers says', 'mending config.json')
  sizes = N, D, H, D // H, F or 4 * D, T, about['vocab_size']
  return family, Shape(*sizes, _period(windows), qkv_bias=not neo)


def _period(windows: Sequence[int | None]) -> tuple[int | None, ...]:
  """The shortest beginning of which a sequence is repetitions, the last one perhaps cut."""
  lengths = range(1, len(windows) + 1)
  p = next(p for p in lengths if all(w == windows[i % p] for i, w in enumerate(windows)))
  return tuple(windows[:p])


def _tensors(folder):
  """The file and the shape of each tensor in a folder, by its name without what a head adds."""
  import safetensors

  there = files.names(folder)
  if INDEX in there:
    with told_as(folder / INDEX, 'an index of tensors', 'copying it again', Exception):
      names = sorted(set(json.loads((folder / INDEX).read_text())['weight_map'].values()))
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


def _check_tensors(folder, table, shape, shapes):
  wanted = {
    row.theirs.format(layer): _lengths(_both(row.dims)[0], shape)
    for row, layer in _all(table, shape)
  }
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
  raise_all(mistakes)


def _all(table, shape) -> Iterator[tuple[Row, int]]:
  """Each row of a table with each layer that it is of, or with 0."""
  for row in table:
    for layer in range(shape.n_layers if '{}' in row.theirs else 1):
      yield row, layer


def _both(dims: str) -> tuple[str, str]:
  there, _, here = dims.partition(' -> ')
  return there, here or there


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


def _lengths(there: str, shape: Shape) -> tuple[int, ...]:
  """Of an array there, whose dims are letters, or several of them in brackets."""
  groups = re.findall(r'\(([^)]*)\)|(\w)', there)
  return tuple(math.prod(_sizes(shape, a or b).values()) for a, b in groups)


# From there.


def load(folder: Folder, abstract: dict) -> dict:
  """The params of a model, as arrays that lie as those of an abstract state say.

  Each device's part is read from the layers that it has; no more than a tensor is held besides.
  """
  table = TABLES[folder.family]

  def array(path, leaf):
    ours = '.'.join(key.key for key in path)
    rows = [row for row in table if row.ours == ours or re.fullmatch(rf'{ours}\.\d', row.ours)]
    part = functools.partial(_part, folder, rows, leaf.shape, ours.startswith('blocks.'))
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

  return jax.tree_util.tree_map_with_path(array, abstract)


def _part(folder, rows, size, stacked, index):
  """Of an array of ours of this size, what lies at an index."""

  def one(layer):
    parts = [folder.read(row, layer) for row in rows]
    whole = parts[0] if rows[0].ours[-1:].isalpha() else np.stack(parts, 1)
    # Rows of the padding of the vocabulary.
    more = [(0, want - have) for want, have in zip(size[stacked:], whole.shape, strict=True)]
    return np.pad(whole, more)

  if not stacked:
    return one(0)[index]
  layers = range(size[0])[index[0]]
  return np.stack([one(layer)[index[1:]] for layer in layers])


# To there.


def family_of(shape: Shape) -> str:
  """The family that a model can be written as.

  Raises:
    Mistake: if there is none.
  """
  fix = 'keeping it here'
  if shape.n_heads * shape.d_head != shape.d_model:
    got = f'{shape.n_heads} · {shape.d_head} = {shape.n_heads * shape.d_head}'
    raise mistake('n_heads · d_head', got, f'd_model, {shape.d_model}, as in GPT-2 and Neo', fix)
  windows = {None if w is None or w >= shape.context else w for w in shape.windows}
  if windows == {None}:
    return 'gpt2'
  if len(windows - {None}) > 1:
    raise mistake('windows', sorted(windows - {None}), 'one, as GPT-Neo has', fix)
  return 'gpt_neo'


def save(
  path: str,
  shape: Shape,
  params: dict,
  logits: Callable[[Shape, dict], np.ndarray],
  end_of_text: int | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> str:
  """Writes a model into a folder that is not there yet, and returns the family that it is one of.

  Args:
    params: of the state, on the mesh that is set.
    logits: of some tokens, by a model of a shape with these params: to see whether a fold holds.
    end_of_text: the token, for the config.

  Raises:
    Mistake: if there is such a folder, or the model cannot be written as one of theirs.
  """
  folder, family = files.folder(path), family_of(shape)
  if files.names(folder):
    raise mistake(folder, 'a folder with files', 'one that is not there yet', 'another --out')
  if family == 'gpt_neo' and shape.qkv_bias:
    bare, folded = dataclasses.replace(shape, qkv_bias=False), fold(params, shape)
    off = float(np.abs(logits(bare, folded) - logits(shape, params)).max())
    if not off <= TOLERANCE:
      got = f'logits that differ by {off:.1e} when they are folded into what GPT-Neo has'
      fix = 'training with --config.model.qkv_bias=False'
      raise mistake('biases of q, k and v', got, f'at most {TOLERANCE:.0e}', fix)
    shape, params = bare, folded
  files.make(folder)
  _write(folder, TABLES[family], shape, params, shard_bytes)
  about = json.dumps(_description(family, shape, end_of_text), indent=2)
  files.write_whole(folder / 'config.json', about + '\n')
  return family


def fold(params: dict, shape: Shape) -> dict:
  """The same function of tokens, its q, k and v without biases.

  A bias of k is the same for all keys of a query, and the softmax does not see it; one of v is
  added to each mean of values, whatever the weights; one of q is a shift of what q's matrix is
  multiplied with, so of the norm's bias before it, and what that does to k and v likewise.
  """
  attn = {name: np.asarray(a, np.float64) for name, a in params['blocks']['attn'].items()}
  N, D = shape.n_layers, shape.d_model
  q_nda, _, v_nda = (attn['qkv'][:, :, c].reshape(N, D, -1) for c in range(3))
  bias_q, _, bias_v = (attn['qkv_bias'][:, c].reshape(N, -1) for c in range(3))
  out_nad = attn['out'].reshape(N, -1, D)
  # Few models are so unlucky that a matrix of theirs has no inverse; then some bias comes out.
  shift_nd = np.stack([np.linalg.lstsq(q.T, b)[0] for q, b in zip(q_nda, bias_q, strict=True)])
  value_na = bias_v - np.einsum('nd,nda->na', shift_nd, v_nda)
  out_bias = attn['out_bias'] + np.einsum('na,nad->nd', value_na, out_nad)
  norm_bias = np.asarray(params['blocks']['attn_norm']['bias'], np.float64) + shift_nd
  laid = lambda new, old: jax.device_put(new.astype(np.float32), old.sharding)
  was = params['blocks']
  bare = {name: a for name, a in was['attn'].items() if name != 'qkv_bias'}
  blocks = was | {
    'attn': bare | {'out_bias': laid(out_bias, bare['out_bias'])},
    'attn_norm': was['attn_norm'] | {'bias': laid(norm_bias, was['attn_norm']['bias'])},
  }
  return params | {'blocks': blocks}


def _write(folder, table, shape, params, shard_bytes):
  """All tensors, in as many files as it takes, and their index if it takes more than one."""
  from safetensors import numpy

  shards, room = [], 0
  for name, size in _bytes(table, shape).items():
    if size > room:
      shards, room = [*shards, {}], max(size, shard_bytes)
    shards[-1][name] = size
    room -= size
  index, tensors = {}, _theirs(table, shape, params)
  for i, shard in enumerate(shards, 1):
    name = ONE if len(shards) == 1 else f'model-{i:05d}-of-{len(shards):05d}.safetensors'
    held = dict(itertools.islice(tensors, len(shard)))
    files.write_whole(folder / name, numpy.save(held, metadata={'format': 'pt'}))
    index |= dict.fromkeys(shard, name)
  if len(shards) > 1:
    total = sum(size for shard in shards for size in shard.values())
    about = {'metadata': {'total_size': total}, 'weight_map': index}
    files.write_whole(folder / INDEX, json.dumps(about, indent=2) + '\n')


def _bytes(table, shape) -> dict[str, int]:
  """The names of all tensors there, in order, and what each takes in f32."""
  return {
    PREFIX + row.theirs.format(layer): 4 * math.prod(_lengths(_both(row.dims)[0], shape))
    for row, layer in _all(table, shape)
  }


def _theirs(table, shape, params) -> Iterator[tuple[str, np.ndarray]]:
  """Name and value of each tensor there, one after the other."""
  for row, layer in _all(table, shape):
    there, here = _both(row.dims)
    name, ours = PREFIX + row.theirs.format(layer), params
    if row.ours.endswith('qkv_bias') and not shape.qkv_bias:
      yield name, np.zeros(_lengths(there, shape), np.float32)
      continue
    for key in filter(str.isidentifier, row.ours.split('.')):
      ours = ours[key]
    ours = ours[layer] if '{}' in row.theirs else ours
    ours = np.asarray(ours[:, int(row.ours[-1])] if row.ours[-1].isdigit() else ours)
    if row.ours == 'embed':
      ours = ours[: shape.vocab_size]
    if row.scaled:
      ours = ours * np.float32(shape.d_head**-0.5)
    yield name, np.ascontiguousarray(einops.rearrange(ours, f'{here} -> {there}'))


def _description(family, shape, end_of_text) -> dict:
  """A config.json that their classes understand."""
  same = {
    'model_type': family,
    'vocab_size': shape.vocab_size,
    'activation_function': 'gelu_new',
    'layer_norm_epsilon': EPSILON,
    'tie_word_embeddings': True,
    'bos_token_id': end_of_text,
    'eos_token_id': end_of_text,
    'torch_dtype': 'float32',
  }
  if family == 'gpt2':
    return same | {
      'architectures': ['GPT2LMHeadModel'],
      'n_layer': shape.n_layers,
      'n_embd': shape.d_model,
      'n_head': shape.n_heads,
      'n_inner': shape.d_ff,
      'n_positions': shape.context,
      'resid_pdrop': 0.0,
      'embd_pdrop': 0.0,
      'attn_pdrop': 0.0,
    }
  windows = [shape.window(layer) for layer in range(shape.n_layers)]
  kinds = ['global' if w is None or w >= shape.context else 'local' for w in windows]
  period = len(_period(kinds))
  whole = shape.n_layers % period == 0
  return same | {
    'architectures': ['GPTNeoForCausalLM'],
    'num_layers': shape.n_layers,
    'hidden_size': shape.d_model,
    'num_heads': shape.n_heads,
    'intermediate_size': shape.d_ff,
    'max_position_embeddings': shape.context,
    'attention_types': [[kinds[:period], shape.n_layers // period] if whole else [kinds, 1]],
    'window_size': min(w for w in windows if w is not None),
    'resid_dropout': 0.0,
    'embed_dropout': 0.0,
    'attention_dropout': 0.0,
  }
