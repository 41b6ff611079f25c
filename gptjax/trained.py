"""A model that has trained, for those who use it: a run of ours, or a folder of Hugging Face."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator

import jax
from etils import epath

from gptjax import checkpoint, config, files, hf, process, sharding
from gptjax.data import tokenizer
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import Mistake, mistake, told_as
from gptjax.sizes import Shape
from gptjax.step import Program


@dataclasses.dataclass(frozen=True)
class Trained:
  """A model of which nothing but what it is was read."""

  folder: epath.Path
  program: Program  # computed on any devices, whatever it was trained on
  load: Callable[[dict], dict]

  @property
  def shape(self) -> Shape:
    """Of the model."""
    return self.program.shape

  def params(self) -> dict:
    """Its weights, on the mesh that is set."""
    return self.load(self.program.abstract_state()['params'])

  def tokenizer(self) -> Tokenizer:
    """The one it was trained with.

    Raises:
      Mistake: if it has none, or another model's.
    """
    text = tokenizer.load(self.folder)
    if text.vocab_size != self.shape.vocab_size:
      wanted = f'{self.shape.vocab_size} tokens, as in config.json'
      got, fix = f'{text.vocab_size} tokens', 'the folder as it was made'
      raise mistake(f'tokenizer in {self.folder}', got, wanted, fix)
    return text


def look(path: str) -> Trained:
  """The model in the workdir of a run, or in a folder that `save_pretrained` made.

  Raises:
    Mistake: if there is none, or what is there does not belong together.
  """
  folder = files.folder(path)
  about = folder / 'config.json'
  if not about.exists():
    got, wanted = f'{path}, without a config.json', 'the workdir of a run, or a folder of weights'
    raise mistake('model', got, wanted, 'training one, or another path')
  wanted = 'the config of a run, or of a model of Hugging Face'
  with told_as(about, wanted, 'the folder as it was made', Exception):
    text = about.read_text()
    theirs = 'model_type' in json.loads(text)
    if not theirs:
      program = config.reopened(text)
      load = lambda like: checkpoint.load_params(folder / 'checkpoints', like)
      return Trained(folder, program, load)
  found = hf.look(path)
  return Trained(folder, config.untrained(found.shape), lambda like: hf.load(found, like))


@contextlib.contextmanager
def over(tensor: int, shape: Shape) -> Iterator[None]:
  """Sets a mesh that splits a model of a shape over so many devices.

  Raises:
    Mistake: if there are fewer, or the model cannot be split like that.
  """
  devices = process.found()
  if not 1 <= tensor <= len(devices):
    raise mistake('--tensor', tensor, f'1 … {len(devices)}, the devices here', '--tensor=1')
  if not _splits(shape, tensor):
    fits = [count for count in range(1, len(devices) + 1) if _splits(shape, count)]
    wanted = 'a number that divides the heads, d_ff, the padded vocabulary and the context'
    raise mistake('--tensor', tensor, wanted, f'--tensor= one of {", ".join(map(str, fits))}')
  with jax.set_mesh(sharding.make_mesh(1, 1, tensor, devices[:tensor])):
    yield


def _splits(shape, count):
  """Whether so many devices may split a model of a shape."""
  try:
    sharding.check(shape, dict.fromkeys(sharding.AXES, 1) | {'tensor': count}, count)
  except Mistake:
    return False
  return True
