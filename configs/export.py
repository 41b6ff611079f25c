"""What `python -m gptjax.export` takes."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Every knob of it."""
  c = ConfigDict()
  c.workdir = 'runs/tiny'  # of the run whose last checkpoint is written
  c.out = 'exported'  # a folder that is not there yet
  return c
