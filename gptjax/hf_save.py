"""A model of ours as a folder of Hugging Face's: what `hf.TABLES` says, read the other way."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath

from gptjax import files, hf
from gptjax.errors import mistake, told_as
from gptjax.fold import fold
from gptjax.sizes import Shape

SHARD_BYTES = 5 * 10**9
TOLERANCE = 1e-4  # of logits, where something was folded


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


def claim(path: str) -> epath.Path:
  """The folder, made if it is not there.

  Raises:
    Mistake: if something is in it, or it cannot be made.
  """
  folder = files.folder(path)
  with told_as(folder, 'a folder to write', 'another --out', OSError):
    if files.names(folder):
      raise mistake(folder, 'a folder with files', 'one that is not there yet', 'another --out')
    files.make(folder)
  return folder


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
  family = family_of(shape)
  if family == 'gpt_neo' and shape.qkv_bias:
    bare, folded = dataclasses.replace(shape, qkv_bias=False), fold(params, shape)
    off = float(np.abs(logits(bare, folded) - logits(shape, params)).max())
    if not off <= TOLERANCE:
      got = f'logits that differ by {off:.1e} when they are folded into what GPT-Neo has'
      fix = 'training with --config.model.qkv_bias=False'
      raise mistake('biases of q, k and v', got, f'at most {TOLERANCE:.0e}', fix)
    shape, params = bare, folded
  folder = claim(path)
  _write(folder, family, shape, params, shard_bytes)
  about = json.dumps(description(family, shape, end_of_text), indent=2)
  files.write_whole(folder / 'config.json', about + '\n')
  return family


def _write(folder, family, shape, params, shard_bytes):
  """All tensors, in as many files as it takes, and their index if it takes more than one."""
  from safetensors import numpy

  shards, room = [], 0
  for name, size in _bytes(family, shape).items():
    if size > room:
      shards, room = [*shards, {}], max(size, shard_bytes)
    shards[-1][name] = size
    room -= size
  index, tensors = {}, _theirs(family, shape, params)
  for i, shard in enumerate(shards, 1):
    name = hf.ONE if len(shards) == 1 else f'model-{i:05d}-of-{len(shards):05d}.safetensors'
    held = dict(itertools.islice(tensors, len(shard)))
    files.write_whole(folder / name, numpy.save(held, metadata={'format': 'pt'}))
    index |= dict.fromkeys(shard, name)
  if len(shards) > 1:
    total = sum(size for shard in shards for size in shard.values())
    about = {'metadata': {'total_size': total}, 'weight_map': index}
    files.write_whole(folder / hf.INDEX, json.dumps(about, indent=2) + '\n')


def _bytes(family, shape) -> dict[str, int]:
  """The names of all tensors there, in order, and what each takes in f32."""
  return {
    hf.PREFIX + row.theirs.format(layer): 4 * math.prod(row.size(shape))
    for row, layer in hf.rows(family, shape)
  }


def _theirs(family, shape, params) -> Iterator[tuple[str, np.ndarray]]:
  """Name and value of each tensor there, one after the other."""
  for row, layer in hf.rows(family, shape):
    name, ours = hf.PREFIX + row.theirs.format(layer), params
    if row.ours.endswith('qkv_bias') and not shape.qkv_bias:
      yield name, np.zeros(row.size(shape), np.float32)
      continue
    for key in filter(str.isidentifier, row.ours.split('.')):
      ours = ours[key]
    ours = ours[layer] if '{}' in row.theirs else ours
    ours = np.asarray(ours[:, int(row.ours[-1])] if row.ours[-1].isdigit() else ours)
    if row.ours == 'embed':
      ours = ours[: shape.vocab_size]
    yield name, row.to_theirs(ours, shape)


def description(family, shape, end_of_text) -> dict:
  """A config.json that their classes understand."""
  same = {
    'model_type': family,
    'vocab_size': shape.vocab_size,
    'activation_function': 'gelu_new',
    'layer_norm_epsilon': hf.EPSILON,
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
  period = len(hf.period(kinds))
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
