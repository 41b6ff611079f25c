"""`python -m gptjax.generate --config=configs/generate.py` continues a prompt."""

import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gptjax import flags, sharding, trained
from gptjax.config import check_seed
from gptjax.errors import mistake, told_as
from gptjax.step import Program


def main(config: ConfigDict) -> None:
  """Prints the prompt and its continuation."""
  if config.tokens < 1 or not 0 <= config.temperature < math.inf:
    got = f'tokens {config.tokens}, temperature {config.temperature}'
    wanted = 'tokens ≥ 1, a finite temperature ≥ 0'
    raise mistake('what to sample', got, wanted, '--config.tokens=100 --config.temperature=0.8')
  with told_as('prompt', 'UTF-8 text', 'another --config.prompt', UnicodeError):
    config.prompt.encode()
  check_seed(config.seed)
  run = trained.look(config.workdir)
  program, text = run.program, run.tokenizer
  with jax.set_mesh(sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])):
    params = run.params()
    prompt = [text.end_of_text, *text.encode(config.prompt)]
    if len(prompt) > program.shape.context:
      seen = f'the model sees the last {program.shape.context} of its {len(prompt)} tokens'
      print(f'the prompt is longer than the context: {seen}', file=sys.stderr)
    tokens = sample(
      program, params, prompt, config.tokens, config.temperature, config.seed, text.end_of_text
    )
  print(config.prompt + text.decode(tokens))


def sample(
  program: Program,
  params: dict,
  prompt: list[int],
  count: int,
  temperature: float,
  seed: int,
  end_of_text: int,
) -> list[int]:
  """At most `count` tokens after the prompt, each from a full forward pass of the last context."""
  T = program.shape.context
  tokens = list(prompt)
  for i in range(count):
    recent = tokens[-T:]
    token_bl = np.zeros((1, T), np.int32)
    token_bl[0, : len(recent)] = recent
    key = jax.random.fold_in(jax.random.key(seed), i)
    token = int(_following(program, params, token_bl, len(recent) - 1, temperature, key))
    if token == end_of_text:
      break
    tokens.append(token)
  return tokens[len(prompt) :]


@functools.partial(jax.jit, static_argnums=0)
def _following(program, params, token_bl, last, temperature, key):
  """A token drawn after position `last`; the likeliest one at temperature 0."""
  logit_v = program.logits(params, token_bl)[0, last, : program.shape.vocab_size]
  drawn = jax.random.categorical(key, logit_v / jnp.maximum(temperature, 1e-6))
  return jnp.where(temperature > 0, drawn, jnp.argmax(logit_v))


if __name__ == '__main__':
  flags.run(main, __doc__)
