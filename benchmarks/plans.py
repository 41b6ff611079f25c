"""`python -m benchmarks.plans`: the eight GPT-3 runs, planned on a TPU and on H100s.

For each it takes the first mesh, microbatch and remat policy that fit, in the order in which
`gptjax.plan --search` tries them, and prints a table in Markdown. Nothing is run.
"""

import argparse
import itertools

import jax

from configs import gpt3
from gptjax import machines, plan
from gptjax.errors import told_plainly

MACHINES = {
  '125m': ('v5e:2x4', 'h100:1x8'),
  '350m': ('v5e:4x4', 'h100:1x8'),
  '760m': ('v5e:4x8', 'h100:1x8'),
  'xl': ('v6e:4x8', 'h100:2x8'),
  '2.7b': ('v6e:8x8', 'h100:4x8'),
  '6.7b': ('v5p:4x4x4', 'h100:8x8'),
  '13b': ('v5p:4x4x8', 'h100:16x8'),
  '175b': ('v5p:8x8x8', 'h100:128x8'),
}
HEAD = (
  '| run | machine | stage·data·fsdp·tensor | rows, remat | GB held | step, s | MFU | days | '
  'device-hours |\n|---|---|---|---|---|---|---|---|---|\n'
)


def row(size: str, topology: str) -> str:
  """A row of the table: from the best case to that in which nothing overlaps."""
  machine = machines.find(topology)
  runs = itertools.chain.from_iterable(plan.candidates(gpt3.get_config(size), machine))
  made = plan.fitting(runs, machine)
  settings, step = made.settings, made.seconds(made.step)
  least, most = made.run_seconds
  hours = [seconds / 3600 * len(made.machine.devices) for seconds in (least, most)]
  cells = (
    f'`{size}`',
    f'`{topology}`',
    settings.shape,
    f'{settings.microbatch}, `{settings.remat}`',
    f'{made.memory.held / 1e9:.1f} of {made.memory.there / 1e9:.1f}',
    f'{step.least:.3g} … {step.most:.3g}',
    f'{made.mfu(step.least):.0%} … {made.mfu(step.most):.0%}',
    f'{least / 86400:.3g} … {most / 86400:.3g}',
    f'{hours[0]:,.0f} … {hours[1]:,.0f}',
  )
  return '| ' + ' | '.join(cells) + ' |\n'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--sizes', nargs='+', choices=MACHINES, default=[*MACHINES])
  a = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  head = HEAD
  for size in a.sizes:
    for topology in MACHINES[size]:
      print(head + row(size, topology), end='', flush=True)
      head = ''


if __name__ == '__main__':
  with told_plainly():
    main()
