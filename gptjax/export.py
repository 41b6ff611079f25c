"""`python -m gptjax.export --workdir=runs/tiny --out=exported` writes a run for Hugging Face.

`AutoModelForCausalLM` and `AutoTokenizer` of `transformers` load the folder as it is.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from os.path import expanduser

import jax
import numpy as np

from gptjax import files, hf_save, hf_tokenizer, products, trained
from gptjax.errors import told_plainly
from gptjax.sizes import Shape
from gptjax.step import Program

TESTED = 256  # tokens, of which the logits are compared where something was folded


def main(argv: Sequence[str] | None = None) -> None:
  """Writes the last checkpoint of a run as a model of their classes.

  Raises:
    Mistake: if there is no run, or it cannot be written as one of theirs.
  """
  parser = argparse.ArgumentParser(prog='python -m gptjax.export', description=__doc__)
  parser.add_argument(
    '--workdir', type=expanduser, required=True, help='of the run, or a folder of Hugging Face'
  )
  parser.add_argument(
    '--out', type=expanduser, required=True, metavar='DIR', help='a folder that is not there yet'
  )
  a = parser.parse_args(argv)
  run = trained.look(a.workdir)
  text = run.tokenizer()
  hf_tokenizer.check()
  folder = hf_save.claim(a.out)
  try:
    with trained.over(1, run.shape):
      params = run.params()
      family = hf_save.save(a.out, run.shape, params, _logits(run.program), text.end_of_text)
    hf_tokenizer.save(a.out, text, run.shape.context)
  except BaseException:  # half of it would be in the way of the next export
    files.remove(folder)
    raise
  print(f'{run.shape.n_params:,} parameters as {family}, and their tokenizer, in {a.out}')


def _logits(program: Program):
  """Of one row of random tokens, by a model of a shape with its params."""
  count = min(TESTED, program.shape.context)
  f32 = np.dtype('float32')
  exact = {'dtype': f32, 'between': f32, 'multiply': products.plainly}
  numerics = dataclasses.replace(program.numerics, **exact)
  token_bl = np.random.default_rng(0).integers(0, program.shape.vocab_size, (1, count))

  def logits(shape: Shape, params: dict) -> np.ndarray:
    model = dataclasses.replace(program, shape=shape, numerics=numerics)
    return np.asarray(jax.jit(model.logits)(params, token_bl))[..., : shape.vocab_size]

  return logits


if __name__ == '__main__':
  with told_plainly():
    main()
