"""`python -m benchmarks.deterministic --size=125m --batch=8`: what `deterministic` costs on a GPU.

The same step in processes with and without it, in turns; takes what `benchmarks.train_step` takes.
Elsewhere both are the same program.
"""

import argparse
import re
import statistics
import subprocess
import sys

ROUNDS = 3


def tokens_per_second(words: list[str]) -> float:
  """Of one process of `benchmarks.train_step`."""
  command = [sys.executable, '-m', 'benchmarks.train_step', *words]
  printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
  return float(re.search(r'([\d,]+) tokens/s', printed)[1].replace(',', ''))


def main() -> None:
  _, words = argparse.ArgumentParser(description=__doc__).parse_known_args()
  rates = {False: [], True: []}
  for _ in range(ROUNDS):
    for fixed, found in rates.items():
      found.append(tokens_per_second(words + ['--deterministic'] * fixed))
  usual, fixed = (statistics.median(found) for found in rates.values())
  print(f'{usual:,.0f} tokens/s, {fixed:,.0f} with deterministic: {usual / fixed:.3f} of the time')


if __name__ == '__main__':
  main()
