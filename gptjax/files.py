"""Files that are there whole or not at all."""

import os
import pathlib


def write_whole(path: str | os.PathLike, data: str | bytes) -> None:
  """Writes a file beside its place and moves it there: dying on the way leaves what was before."""
  path = pathlib.Path(path)
  beside = path.with_name(f'{path.name}.incomplete')
  with beside.open('wb') as file:
    file.write(data.encode() if isinstance(data, str) else data)
    file.flush()
    os.fsync(file.fileno())
  beside.replace(path)
