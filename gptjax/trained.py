"""A run that has trained, for those who use what it made."""

import dataclasses

from etils import epath

from gptjax import checkpoint, config, files
from gptjax.data import tokenizer
from gptjax.errors import mistake, told_as
from gptjax.step import Program


@dataclasses.dataclass(frozen=True)
class Trained:
  """A run whose config and tokenizer were read; one device is enough for it."""

  workdir: epath.Path
  program: Program
  tokenizer: tokenizer.Tokenizer

  def params(self) -> dict:
    """The weights of its last checkpoint, on the mesh that is set."""
    like = self.program.abstract_state()['params']
    return checkpoint.load_params(self.workdir / 'checkpoints', like)


def look(path: str) -> Trained:
  """The run in a workdir, computed on one device whatever it was trained on.

  Raises:
    Mistake: if there is none, or what it wrote does not belong together.
  """
  workdir = files.folder(path)
  if not (workdir / 'config.json').exists():
    got = f'{path}, without a config.json'
    raise mistake(
      'workdir', got, 'the workdir of a run', 'training one, or --config.workdir=runs/…'
    )
  with told_as(workdir / 'config.json', 'the config of a run', 'training on writes it', Exception):
    program = config.reopened((workdir / 'config.json').read_text())
  text = tokenizer.load(workdir)
  if text.vocab_size != program.shape.vocab_size:
    wanted = f'{program.shape.vocab_size} tokens, as in config.json'
    got, fix = f'{text.vocab_size} tokens', 'the workdir as training left it'
    raise mistake(f'tokenizer in {workdir}', got, wanted, fix)
  return Trained(workdir, program, text)
