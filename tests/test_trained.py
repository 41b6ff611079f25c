"""What made a model is what opens it."""

import numpy as np
import pytest

from gptjax import trained
from gptjax.errors import Mistake
from tests import small, their_models
from tests.runs import CONTEXT


def test_a_run_is_opened_with_what_it_was_trained_as(straight):
  run = trained.look(straight[0])
  assert run.shape.context == CONTEXT and run.tokenizer().vocab_size == 257
  with small.on():
    params = run.params()
  assert params['embed'].shape == (384, 32)


def test_a_folder_of_hugging_face_is_opened(tmp_path):
  model = their_models.make('gpt_neo')
  model.save_pretrained(tmp_path)
  found = trained.look(tmp_path)
  token_bl = np.arange(20)[None]
  with small.on():
    got = found.program.logits(found.params(), token_bl)[..., :250]
  np.testing.assert_allclose(got, their_models.logits(model, token_bl), rtol=1e-4, atol=1e-4)
  with pytest.raises(Mistake, match='tokenizer: got .* no tokenizer.json'):
    found.tokenizer()


def test_a_folder_without_a_model_is_told(tmp_path):
  with pytest.raises(Mistake, match='model: got .*without a config.json'):
    trained.look(tmp_path)


def test_devices_that_are_not_there_are_no_fault_of_the_folder(straight, run_python):
  program = f"from gptjax import trained\ntrained.look('{straight[0]}')"
  done = run_python(program, timeout=60, code=1, env={'JAX_PLATFORMS': 'abacus'})
  assert 'Mistake: devices: got RuntimeError' in done.stderr and 'config.json' not in done.stderr


def test_a_mesh_that_does_not_fit_is_told():
  for tensor, told in ((0, 'got 0, wanted 1 … 8'), (9, 'got 9'), (3, 'got 3, .*one of 1, 2')):
    with pytest.raises(Mistake, match=told):
      with trained.over(tensor, small.SHAPE):
        raise AssertionError('no mesh should be set')
