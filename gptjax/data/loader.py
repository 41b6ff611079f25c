"""The stream of tokens as a pure function of (seed, sequence index), and its rows on devices."""

import concurrent.futures
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import grain
import jax
import numpy as np

from gptjax import sharding
from gptjax.data.mixture import Mixture
from gptjax.errors import mistake

MAX_WINDOWS = 2**32 - 1  # Grain shuffles indices of 32 bits


class Stream:
  """The stream of tokens: element i is a window, by the seed, the mixture and i alone.

  Each epoch of a source is a permutation of it, so nothing of it comes twice before everything was
  seen; epochs differ. There is no state: whoever reads element i, after whatever else, gets the
  same. Raises a Mistake for a source that is too long to shuffle.
  """

  def __init__(self, sources: Mapping[str, Sequence], mixture: Mixture, seed: int):
    """`sources` of the mixture's last stage at least, each by the name that the mixture uses."""
    self._mixture = mixture
    self.blank = next(iter(sources.values())).blank
    self._shuffled = {name: _shuffled(name, source, seed) for name, source in sources.items()}

  def __getitem__(self, index: int) -> np.ndarray:
    name, i = self._mixture.locate(index)
    return self._shuffled[name][i]


def _shuffled(name: str, source: Sequence, seed: int) -> grain.MapDataset:
  if len(source) > MAX_WINDOWS:
    fix = 'cutting it into several sources'
    raise mistake(f'windows in source {name}', len(source), f'at most {MAX_WINDOWS}', fix)
  # A seed of its own, so that sources of one length are not shuffled alike.
  own = hashlib.sha256(f'{seed} {name}'.encode()).digest()[:4]
  return grain.MapDataset.source(source).shuffle(int.from_bytes(own, 'little')).repeat()


def place(
  windows: Sequence, start: int, count: int, slices: int, rows: int, mesh: jax.sharding.Mesh
) -> jax.Array:
  """The windows `start … start + count - 1` as rows on a mesh, then rows of zeros.

  Args:
    windows: a `Stream`, or a source in its own order; with one like them of zeros as `blank`.
    start: index of the first window.
    count: windows to read, at most slices · rows.
    slices: g.
    rows: b, split over the batch axes.
    mesh: where to lay them.

  Returns:
    Tokens [g, b, context + 1], in order along g and b. Each process reads only the rows of its
    own devices.
  """
  index_gb = start + np.arange(slices * rows).reshape(slices, rows)
  blank = windows.blank
  already_read = {}  # devices that differ only along `tensor` hold the same rows

  def read(index):
    mine_gb = index_gb[index[:2]]
    key = mine_gb.tobytes()
    if key not in already_read:
      token_gbl = np.tile(blank, (*mine_gb.shape, 1))
      for at in zip(*np.nonzero(mine_gb < start + count), strict=True):
        token_gbl[at] = windows[int(mine_gb[at])]
      already_read[key] = token_gbl
    return already_read[key]

  with jax.set_mesh(mesh):  # which is not set in another thread
    layout = jax.NamedSharding(mesh, sharding.computed('gbl'))
  return jax.make_array_from_callback((slices, rows, len(blank)), layout, read)


def prefetch(make: Callable, items: Iterable, depth: int) -> Iterator[tuple]:
  """Each item with what `make` gives for it, `depth` of them made ahead in another thread."""
  with concurrent.futures.ThreadPoolExecutor(1, 'prefetch') as executor:
    ahead = []
    try:
      for item in items:
        ahead.append((item, executor.submit(make, item)))
        if len(ahead) > depth:
          item, made = ahead.pop(0)
          yield item, made.result()
      while ahead:
        item, made = ahead.pop(0)
        yield item, made.result()
    finally:
      for _, made in ahead:
        made.cancel()
