"""A corpus, a config and a command line small enough for real runs in seconds."""

import json
import pathlib
import signal
import subprocess
import time

from configs import tiny
from gptjax import journal, schedule, sharding, train
from gptjax.data import loader, shards
from tests import texts

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
  mine = {'context': CONTEXT, 'vocab_size': 257, 'seed': 0, 'validation_fraction': 0.1, 'shards': 2}
  return texts.prepared(text, folder / 'prepared', **mine | knobs).folder


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


def records(workdir, kind='train'):
  """Of the metrics of a run, without what depends on the machine's speed."""
  return journal.timeless(workdir, kind)


def wait_for_records(workdir, process, count):
  """Until a run that was started has written so many records, or has ended."""
  path = pathlib.Path(workdir) / journal.FILE
  while process.poll() is None:
    if path.exists() and len(path.read_bytes().splitlines()) >= count:
      return
    time.sleep(0.01)
