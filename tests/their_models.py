"""Models of `transformers` with random weights, and the same ones here."""

import dataclasses
import functools

import jax
import numpy as np
import torch
import transformers

from gptjax import hf, hf_save
from gptjax.sizes import Shape
from tests import small

# d_head 16: its root is a power of two, so that nothing is rounded on the way.
SHAPES = {
  'gpt2': Shape(3, 64, 4, 16, 256, 24, 250, (None,)),
  'gpt_neo': Shape(4, 64, 4, 16, 96, 24, 250, (None, 5), qkv_bias=False),
}
TOKENS = np.random.default_rng(0).integers(0, 250, (2, 24))
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]
KINDS = {
  'gpt2': (transformers.GPT2Config, transformers.GPT2LMHeadModel),
  'gpt_neo': (transformers.GPTNeoConfig, transformers.GPTNeoForCausalLM),
}


def make(family: str, vocab_size: int = 250) -> torch.nn.Module:
  """A model with random weights, biases and norms too."""
  shape = dataclasses.replace(SHAPES[family], vocab_size=vocab_size)
  about = hf_save.description(family, shape, 0)
  config, kind = KINDS[family]
  torch.manual_seed(0)
  left_out = ('model_type', 'torch_dtype')
  model = kind(config(**{k: v for k, v in about.items() if k not in left_out})).eval()
  for weight in model.parameters():
    torch.nn.init.normal_(weight, std=0.2 if weight.ndim > 1 else 0.5)
  return model


def logits(model: torch.nn.Module, token_bl: np.ndarray) -> np.ndarray:
  """Of all tokens, in f32."""
  with torch.no_grad():
    return model(torch.tensor(token_bl)).logits.numpy()


def ours(shape: Shape, params: dict) -> np.ndarray:
  """The logits of TOKENS by a model of ours, in f32."""
  return np.asarray(jax.jit(small.program(shape).logits)(params, TOKENS))[..., : shape.vocab_size]


def generate(model: torch.nn.Module, prompts: list[list[int]], **settings):
  """What it makes of prompts of one length, without them; or all that it tells, if asked to."""
  with torch.no_grad():
    made = model.generate(
      torch.tensor(prompts),
      attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.long),
      do_sample=False,
      pad_token_id=249,
      **settings,
    )
  return made[:, len(prompts[0]) :].tolist() if isinstance(made, torch.Tensor) else made


@functools.cache
def same_here(family: str, folder: str):
  """A model of a family, saved in a folder; a program, and its params on the mesh that is set."""
  model = make(family)
  model.save_pretrained(folder)
  found = hf.look(folder)
  program = small.program(found.shape)
  params = hf.load(found, program.abstract_state()['params'])
  return model, program, jax.tree.map(np.asarray, params)
