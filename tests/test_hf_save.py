"""One of our models is the same function there, and what was read is written as it was."""

import dataclasses

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from gptjax import hf, hf_save
from gptjax.errors import Mistake
from tests import small, their_models

TOKENS = their_models.TOKENS
our_logits = their_models.ours


def loud(shape, seed=1):
  """Params with opinions, biases too."""
  random = np.random.default_rng(seed)
  draw = lambda a: random.normal(0, 0.2, a.shape).astype('float32')
  params = jax.tree.map(draw, small.program(shape).abstract_state()['params'])
  params['embed'][shape.vocab_size :] = 0
  return jax.tree.map(jax.numpy.asarray, params)


@pytest.mark.parametrize('family', their_models.SHAPES)
def test_what_is_written_again_is_what_was_read(family, tmp_path):
  their_models.make(family).save_pretrained(tmp_path / 'there')
  folder = hf.look(tmp_path / 'there')
  program = small.program(folder.shape)
  with small.on():
    params = hf.load(folder, program.abstract_state()['params'])
    assert hf_save.save(tmp_path / 'again', folder.shape, params, our_logits) == family
  before, after = (load_file(tmp_path / name / hf.ONE) for name in ('there', 'again'))
  assert before.keys() == after.keys()
  for name in before:
    np.testing.assert_array_equal(before[name], after[name])


@pytest.mark.parametrize(
  'windows',
  [(None,), (None, 5), *(pytest.param(w, marks=pytest.mark.slow) for w in ((5, None, None), (5,)))],
)
@pytest.mark.parametrize('biases, shard_bytes', [(True, 10**9), (True, 50_000), (False, 10**9)])
def test_an_exported_model_has_our_logits(tmp_path, windows, biases, shard_bytes):
  """As their classes load it by themselves; GPT-Neo's with what its biases were folded into."""
  shape = dataclasses.replace(their_models.SHAPES['gpt_neo'], windows=windows, qkv_bias=biases)
  with small.on():
    params = loud(shape)
    about = {'end_of_text': 7, 'shard_bytes': shard_bytes}
    hf_save.save(tmp_path / 'out', shape, params, our_logits, **about)
    want = our_logits(shape, params)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
  kind = 'GPT2LMHeadModel' if windows == (None,) else 'GPTNeoForCausalLM'
  assert type(model).__name__ == kind and model.config.eos_token_id == 7
  np.testing.assert_allclose(their_models.logits(model, TOKENS), want, rtol=1e-4, atol=1e-4)
  assert ((tmp_path / 'out' / hf.INDEX).exists()) == (shard_bytes < 10**9)


def test_what_was_folded_and_does_not_hold_is_refused(tmp_path):
  shape = dataclasses.replace(their_models.SHAPES['gpt_neo'], qkv_bias=True)
  with small.on():
    params = loud(shape)
  q = params['blocks']['attn']['qkv']
  # A matrix of q that sees one direction only cannot make its bias.
  params['blocks']['attn']['qkv'] = q.at[:, :, 0].set(q[:, :, 0, :1, :1])
  with small.on(), pytest.raises(Mistake, match='logits that differ by .*qkv_bias=False'):
    hf_save.save(tmp_path / 'out', shape, params, our_logits)
  assert not (tmp_path / 'out').exists()


def test_a_shape_that_they_have_not_is_refused():
  shape = their_models.SHAPES['gpt_neo']
  wide = dataclasses.replace(shape, n_heads=8)
  with pytest.raises(Mistake, match=r'n_heads · d_head: got 8 · 16 = 128, wanted d_model, 64'):
    hf_save.family_of(wide)
  with pytest.raises(Mistake, match=r'windows: got \[5, 7\], wanted one'):
    hf_save.family_of(dataclasses.replace(shape, windows=(5, 7)))
  assert hf_save.family_of(dataclasses.replace(shape, windows=(None, 24))) == 'gpt2'
