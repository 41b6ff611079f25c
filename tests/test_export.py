"""A run that was trained here speaks there."""

import numpy as np
import pytest
import torch
import transformers

from configs import export as configs
from gptjax import export, trained
from gptjax.errors import Mistake
from tests import small


def test_a_trained_run_has_the_same_logits_there(straight, tmp_path, run_python):
  out = tmp_path / 'out'
  flags = [f'--config.workdir={straight[0]}', f'--config.out={out}']
  command = ['-m', 'gptjax.export', '--config=configs/export.py', *flags]
  done = run_python(command, timeout=120)
  assert done.stdout == f'26,400 parameters as gpt_neo in {out}\n'
  model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
  run = trained.look(straight[0])
  token_bl = np.array([[run.tokenizer.end_of_text, *run.tokenizer.encode('def main(')]])
  with torch.no_grad():
    got = model(torch.tensor(token_bl)).logits.numpy()
  with small.on():
    want = np.asarray(run.program.logits(run.params(), token_bl))[..., :257]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  assert 'a folder with files' in run_python(command, timeout=120, code=2).stderr


def test_no_place_is_told():
  with pytest.raises(Mistake, match='out: got none'):
    c = configs.get_config()
    c.out = ''
    export.main(c)
