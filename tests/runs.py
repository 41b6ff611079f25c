"""A corpus, a config and a command line small enough for real runs in seconds."""

import dataclasses
import json
import pathlib
import signal
import subprocess

from configs import tiny
from gptjax import prepare, schedule, sharding, train
from gptjax.data import engines, loader, shards

CONTEXT = 32
# Small enough for seconds, with all of the recipe: a ramp of three rungs, warm-up and cosine.
SETTINGS = {
  'model.n_layers': 2,
  'model.d_model': 32,
  'model.n_heads': 4,
  'model.d_head': 8,
  'model.d_ff': 64,
  'model.context': CONTEXT,
  'model.vocab_size': 257,
  'model.window': 8,
  'batch.sequences': 24,
  'batch.ramp_from': 8,
  'batch.ramp_step': 8,
  'batch.ramp_tokens': 2048.0,
  'compute.microbatch': 1,
  'train_tokens': 12288.0,
  'lr.peak': 1e-2,
  'lr.warmup_tokens': 2048.0,
  'lr.decay_tokens': 12288.0,
  'eval.every_tokens': 4096.0,
  'eval.sequences': 20,
  'save.every_tokens': 2048.0,
  'log.tensorboard': False,
}


MODULES = (json, signal, subprocess, schedule, sharding, loader, train, shards)


def make_corpus(folder: pathlib.Path, modules=MODULES, **knobs) -> str:
  """Prepares the text of some modules, as bytes, in a folder."""
  text = folder / 'text'
  text.mkdir(parents=True)
  for module in modules:
    name = module.__name__.replace('.', '_')
    parts = pathlib.Path(module.__file__).read_text(encoding='utf-8').split('\n\n\n')
    for i, part in enumerate(parts):
      (text / f'{name}_{i}.txt').write_text(part)
  recipe = prepare.Recipe(
    source=str(text),
    text_column='text',
    context=CONTEXT,
    tokenizer='bytes',
    vocab_size=257,
    seed=0,
    validation_fraction=0.1,
    shards=2,
    on_bad_text='raise',
  )
  recipe = dataclasses.replace(recipe, **knobs)
  prepared = folder / 'prepared'
  prepare.prepare(recipe, str(prepared), engines.processes(1))
  return str(prepared)


def dotted(settings):
  """Keyword arguments as knobs: `mesh__fsdp` is `mesh.fsdp`."""
  return {name.replace('__', '.'): value for name, value in settings.items()}


def config(workdir, corpus, **settings):
  c = tiny.get_config()
  given = {'workdir': str(workdir), 'data.sources': corpus}
  c.update_from_flattened_dict(SETTINGS | given | dotted(settings))
  return c


def args(workdir, corpus, **settings):
  """The same config as a command line."""
  settings = SETTINGS | {'workdir': workdir, 'data.sources': corpus} | dotted(settings)
  flags = [f'--config.{name}={value}' for name, value in settings.items()]
  return ['-m', 'gptjax.train', '--config=configs/tiny.py', *flags]
