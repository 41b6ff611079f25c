"""What made a run is what opens it."""

import pytest

from gptjax import trained
from gptjax.errors import Mistake
from tests import small
from tests.runs import CONTEXT


def test_a_run_is_opened_with_what_it_was_trained_as(straight):
  run = trained.look(straight[0])
  assert run.program.shape.context == CONTEXT and run.tokenizer.vocab_size == 257
  with small.on():
    params = run.params()
  assert params['embed'].shape == (384, 32)


def test_a_folder_without_a_run_is_told(tmp_path):
  with pytest.raises(Mistake, match='workdir: got .*without a config.json'):
    trained.look(tmp_path)
