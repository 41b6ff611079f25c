"""A run that was trained here speaks there."""

import numpy as np
import pytest
import torch
import transformers

from gptjax import export, hf_tokenizer, trained
from gptjax.errors import Mistake
from tests import small


@pytest.mark.slow
def test_a_trained_run_says_the_same_there(straight, tmp_path, run_python):
  """Its logits, its tokens, and what `generate` makes of them; and the folder is a model here."""
  out = tmp_path / 'out'
  command = ['-m', 'gptjax.export', f'--workdir={straight[0]}', f'--out={out}']
  done = run_python(command, timeout=120)
  assert done.stdout == f'26,400 parameters as gpt_neo, and their tokenizer, in {out}\n'
  model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
  text = transformers.AutoTokenizer.from_pretrained(out)
  run = trained.look(straight[0])
  end = run.tokenizer().end_of_text
  token_bl = np.array([[end, *text('def main(')['input_ids']]])
  assert token_bl.tolist() == [[end, *run.tokenizer().encode('def main(')]]
  with torch.no_grad():
    got = model(torch.tensor(token_bl)).logits.numpy()
    made = model.generate(torch.tensor(token_bl), max_new_tokens=16, do_sample=False)
  with small.on():
    want = np.asarray(run.program.logits(run.params(), token_bl))[..., :257]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  greedy = ['--prompt=def main(', '--tokens=16', '--temperature=0']
  for model in (f'--workdir={straight[0]}', f'--hf={out}'):
    said = run_python(['-m', 'gptjax.generate', model, *greedy], timeout=120).stdout
    assert said == text.decode(made[0], skip_special_tokens=True) + '\n'
  assert 'a folder with files' in run_python(command, timeout=120, code=2).stderr


def test_an_export_that_was_stopped_is_not_in_the_way(straight, tmp_path, monkeypatch):
  words = [f'--workdir={straight[0]}', f'--out={tmp_path / "out"}']

  def stop(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(hf_tokenizer, 'save', stop)
    export.main(words)
  assert not (tmp_path / 'out').exists()
  export.main(words)
  assert (tmp_path / 'out' / 'tokenizer.json').exists()


def test_no_run_is_told(tmp_path):
  with pytest.raises(Mistake, match='without a config.json'):
    export.main([f'--workdir={tmp_path}', f'--out={tmp_path / "out"}'])


def test_a_place_that_cannot_be_is_told_before_anything_is_read(straight, tmp_path):
  (tmp_path / 'file').write_text('')
  for out in (tmp_path / 'file', tmp_path / 'file' / 'x'):
    with pytest.raises(Mistake, match='NotADirectoryError.*wanted a folder to write'):
      export.main([f'--workdir={straight[0]}', f'--out={out}'])
