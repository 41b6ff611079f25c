"""Mixtures of corpora: `--config=configs/mixtures.py:gpt3`, or `:gpt3:13b` for another size."""

from ml_collections import ConfigDict

from configs import gpt3
from gptjax.errors import mistake

# Weights in percent. Brown et al. 2020, Table 2.2, whose weights sum to 101.
MIXTURES = {
  'gpt3': {'common_crawl': 60, 'webtext2': 22, 'books1': 8, 'books2': 8, 'wikipedia': 3},
}


def get_config(name: str = 'gpt3') -> ConfigDict:
  """A GPT-3 of configs/gpt3.py on a mixture of corpora, each prepared in data/NAME."""
  mixture, _, size = name.partition(':')
  if mixture not in MIXTURES:
    known = f'one of {" ".join(MIXTURES)}'
    raise mistake('mixture', mixture, known, 'configs/mixtures.py:gpt3')
  size = size or '125m'
  c = gpt3.get_config(size)
  c.workdir = f'runs/mixture-{mixture}-{size}'
  sources = (f'data/{corpus}={weight}' for corpus, weight in MIXTURES[mixture].items())
  c.data.sources = ','.join(sources)
  return c
