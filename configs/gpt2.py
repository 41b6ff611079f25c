"""The four GPT-2 models (Radford et al. 2019): `--config=configs/gpt2.py:124m`.

To train one, or to go on from OpenAI's weights with `--config.init_from=DIR`. What is not set here
is as in `configs/gpt3.py`, whose nearest size gives the recipe: GPT-2's own was not published.
"""

from ml_collections import ConfigDict

from configs import gpt3
from gptjax.errors import mistake

# Layers, d_model and heads of its table 2, by what the weights are called today; the table's own
# parameter counts are wrong, as OpenAI's repository says.
GPT2 = {
  '124m': (12, 768, 12, '125m'),
  '355m': (24, 1024, 16, '350m'),
  '774m': (36, 1280, 20, '760m'),
  '1558m': (48, 1600, 25, 'xl-16h'),
}


def get_config(size: str = '124m') -> ConfigDict:
  """A size: 124m 355m 774m 1558m."""
  if size not in GPT2:
    raise mistake('size of GPT-2', size, f'one of {" ".join(GPT2)}', 'configs/gpt2.py:124m')
  n_layers, d_model, n_heads, recipe = GPT2[size]
  c = gpt3.get_config(recipe)
  c.workdir = f'runs/gpt2-{size}'
  c.model.n_layers = n_layers
  c.model.d_model = d_model
  c.model.n_heads = n_heads
  c.model.d_head = d_model // n_heads
  c.model.d_ff = 4 * d_model
  c.model.context = 1024
  c.model.pattern = ('dense',)
  return c
