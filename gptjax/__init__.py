"""gptjax pretrains the GPT-3 models of Brown et al. 2020 in JAX."""

import sys

from gptjax import garbage

if sys.argv[0] == '-m':  # `python -m gptjax.…`, and not a program that imports it
  garbage.look_rarely()
