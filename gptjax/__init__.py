"""gptjax pretrains the GPT-3 models of Brown et al. 2020 in JAX."""

import signal
import sys

from gptjax import garbage

if sys.argv[0] == '-m':  # `python -m gptjax.…`, and not a program that imports it
  garbage.look_rarely()
  # Ctrl-C ends it until `errors.told_plainly`: what is being imported may crash of it, or not
  # pass it on.
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
