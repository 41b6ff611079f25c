"""`python -m benchmarks.gpu_results MADE OUT`: what benchmarks/gpu.sh has measured, as tables.

Reads what its parts have left in one folder and writes results.json and results.md into another.
With `--seen` it says what is there to measure with: `torch` if PyTorch has the GPU that JAX
has, and nothing if it has not; code 1 without such a JAX.
"""

import argparse
import importlib
import json
import pathlib
import shutil
import sys

from gptjax import files

COLUMNS = ('size', 'contender', 'rows', 'tokens/s', 'MFU', 'peak GB', 'ours is')


def collect(made: pathlib.Path) -> dict:
  """All figures: of the parts in the order that they ran in, and how each ended."""
  found = {}
  for line in (made / 'parts.tsv').read_text().splitlines():
    part, code, seconds = line.split('\t')
    figures = made / f'{part}.json'
    found[part] = {'code': int(code), 'seconds': int(seconds)}
    if figures.exists():
      found[part] |= json.loads(figures.read_text())
  return found


def markdown(found: dict) -> str:
  """The same as tables."""
  blocks = []
  sizes = {part: about for part, about in found.items() if 'parameters' in about}
  if sizes:
    on = next(iter(sizes.values()))['on']
    lines = [f'Context 2048, on {on}.', '', *_head(COLUMNS)]
    for size, about in sizes.items():
      lines += [_line(size, name, *_cells(row)) for name, row in about['rows'].items()]
      if about['losses_apart']:
        lines += [_line(size, 'the first losses differ', *about['losses_apart'])]
    blocks.append(lines)
  if layers := found.get('attention', {}).get('layers'):
    about = found['attention']
    lines = [f'Attention, forward and backward: {about["rows"]} rows, {about["on"]}.', '']
    lines += _head(('tokens', 'dense, ms', 'banded, ms', 'dense is'))
    for L in sorted({layer['tokens'] for layer in layers}):
      dense, banded = (
        next(x['seconds'] for x in layers if (x['tokens'], x['layer']) == (L, layer))
        for layer in ('dense', 'banded')
      )
      times = f'{1e3 * dense:.3f}', f'{1e3 * banded:.3f}', f'{dense / banded:.2f} ×'
      lines.append(_line(f'{L:,}', *times))
    blocks.append(lines)
  if curves := found.get('curve', {}).get('losses'):
    lines = [f'{name} ends at {losses[-1]:.4f} nats' for name, losses in curves.items()]
    apart = [f'{name} is at most {gap:.2g} apart' for name, gap in found['curve']['apart'].items()]
    blocks.append(['Curve: ' + '; '.join(lines + apart) + '.'])
  ended = [
    _line(part, f'{about["seconds"]} s', 'done' if about['code'] == 0 else f'code {about["code"]}')
    for part, about in found.items()
  ]
  blocks.append([*_head(('part', 'took', 'ended')), *ended])
  return '\n\n'.join('\n'.join(lines) for lines in blocks) + '\n'


def _head(columns):
  return [_line(*columns), '|' + '---|' * len(columns)]


def _line(*cells):
  return f'| {" | ".join(cells)} |'


def _cells(row):
  if 'failed' in row:
    return f'{row["rows"]}', f'{row["failed"]}: {row["told"]}', '', '', ''
  ratio, mfu = row['ours_over_theirs'], row['mfu']
  return (
    f'{row["rows"]}',
    f'{row["tokens_per_second"]:,.0f}',
    '' if mfu is None else f'{mfu:.1%}',
    f'{row["peak_bytes"] / 1e9:.1f}',
    f'{ratio:.2f} ×' if ratio else '',
  )


def seen() -> bool:
  """Says what is there and what is missing; whether a JAX with a GPU is, and prints `torch`."""
  tell = lambda told: print(told, file=sys.stderr)
  try:
    importlib.import_module('benchmarks.train_step')
  except ImportError as e:
    tell(f'missing  {e.name or e}, which gptjax wants')
    return False
  import jax

  device = jax.devices()[0]
  tell(f'jax      {jax.__version__} on {device.platform}, {device.device_kind}')
  if device.platform != 'gpu':
    return False
  try:
    import torch
  except ImportError:
    tell('missing  torch')
    return True
  build = f'torch    {torch.__version__}, CUDA {torch.version.cuda or "none"}'
  if torch.cuda.is_available():
    tell(f'{build}, {torch.cuda.get_device_name()}')
    print('torch')
  else:
    tell(f'{build}: it sees no GPU')
  return True


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('folders', nargs='*', type=pathlib.Path, help='MADE and OUT')
  parser.add_argument('--seen', action='store_true', help='say what is there to measure with')
  a = parser.parse_args()
  if a.seen:
    sys.exit(0 if seen() else 1)
  if len(a.folders) != 2:
    parser.error('MADE and OUT are wanted, or --seen')
  made, out = a.folders
  found = collect(made)
  files.write_whole(out / 'results.json', json.dumps(found, indent=1))
  files.write_whole(out / 'results.md', markdown(found))
  if (made / 'curve.png').exists():
    shutil.copy(made / 'curve.png', out)


if __name__ == '__main__':
  main()
