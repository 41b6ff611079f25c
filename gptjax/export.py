"""`python -m gptjax.export --config=configs/export.py` writes a run for Hugging Face."""

import dataclasses

import jax
import numpy as np
from ml_collections import ConfigDict

from gptjax import flags, hf, sharding, trained
from gptjax.errors import mistake
from gptjax.sizes import Shape
from gptjax.step import Program

TESTED = 256  # tokens, of which the logits are compared where something was folded


def main(config: ConfigDict) -> None:
  """Writes the last checkpoint of a run as a model of their classes."""
  if not config.out:
    raise mistake('out', 'none', 'a folder that is not there yet', '--config.out=exported')
  run = trained.look(config.workdir)
  with jax.set_mesh(sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])):
    params, shape = run.params(), run.program.shape
    family = hf.save(config.out, shape, params, _logits(run.program), run.tokenizer.end_of_text)
  print(f'{shape.n_params:,} parameters as {family} in {config.out}')


def _logits(program: Program):
  """Of one row of random tokens, by a model of a shape with its params."""
  count = min(TESTED, program.shape.context)
  numerics = dataclasses.replace(program.numerics, dtype=np.dtype('float32'))
  token_bl = np.random.default_rng(0).integers(0, program.shape.vocab_size, (1, count))

  def logits(shape: Shape, params: dict) -> np.ndarray:
    model = dataclasses.replace(program, shape=shape, numerics=numerics)
    return np.asarray(jax.jit(model.logits)(params, token_bl))[..., : shape.vocab_size]

  return logits


if __name__ == '__main__':
  flags.run(main, __doc__)
