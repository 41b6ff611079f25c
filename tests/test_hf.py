"""A model of Hugging Face is the same function here, and one of ours is the same there."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from gptjax import hf
from gptjax.errors import Mistake
from tests import small, their_models

TOKENS = np.random.default_rng(0).integers(0, 250, (2, 24))


def our_logits(shape, params):
  return np.asarray(jax.jit(small.program(shape).logits)(params, TOKENS))[..., : shape.vocab_size]


def ours(shape, seed=1):
  """Params with opinions, biases too."""
  random = np.random.default_rng(seed)
  draw = lambda a: random.normal(0, 0.2, a.shape).astype('float32')
  params = jax.tree.map(draw, small.program(shape).abstract_state()['params'])
  params['embed'][shape.vocab_size :] = 0
  return jax.tree.map(jax.numpy.asarray, params)


@pytest.fixture(params=list(their_models.SHAPES))
def imported(request, tmp_path):
  model = their_models.make(request.param)
  model.save_pretrained(tmp_path / 'there')
  return request.param, model, hf.look(tmp_path / 'there')


def test_an_imported_model_has_their_logits(imported):
  family, model, folder = imported
  assert folder.family == family and folder.shape == their_models.SHAPES[family]
  program = small.program(folder.shape)
  with small.on(fsdp=2, tensor=2):
    params = hf.load(folder, program.abstract_state()['params'])
    got = our_logits(folder.shape, params)
  np.testing.assert_allclose(got, their_models.logits(model, TOKENS), rtol=1e-4, atol=1e-4)


def test_what_is_written_again_is_what_was_read(imported, tmp_path):
  family, model, folder = imported
  program = small.program(folder.shape)
  with small.on():
    params = hf.load(folder, program.abstract_state()['params'])
    assert hf.save(tmp_path / 'again', folder.shape, params, our_logits) == family
  before, after = (load_file(tmp_path / name / hf.ONE) for name in ('there', 'again'))
  assert before.keys() == after.keys()
  for name in before:
    np.testing.assert_array_equal(before[name], after[name])


@pytest.mark.parametrize('windows', [(None,), (None, 5), (5, None, None), (5,)])
@pytest.mark.parametrize('biases, shard_bytes', [(True, 10**9), (True, 50_000), (False, 10**9)])
def test_an_exported_model_has_our_logits(tmp_path, windows, biases, shard_bytes):
  """As their classes load it by themselves; GPT-Neo's with what its biases were folded into."""
  shape = dataclasses.replace(their_models.SHAPES['gpt_neo'], windows=windows, qkv_bias=biases)
  with small.on():
    params = ours(shape)
    hf.save(tmp_path / 'out', shape, params, our_logits, end_of_text=7, shard_bytes=shard_bytes)
    want = our_logits(shape, params)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
  kind = 'GPT2LMHeadModel' if windows == (None,) else 'GPTNeoForCausalLM'
  assert type(model).__name__ == kind and model.config.eos_token_id == 7
  np.testing.assert_allclose(their_models.logits(model, TOKENS), want, rtol=1e-4, atol=1e-4)
  assert ((tmp_path / 'out' / hf.INDEX).exists()) == (shard_bytes < 10**9)


def test_what_was_folded_and_does_not_hold_is_refused(tmp_path):
  shape = dataclasses.replace(their_models.SHAPES['gpt_neo'], qkv_bias=True)
  with small.on():
    params = ours(shape)
  q = params['blocks']['attn']['qkv']
  # A matrix of q that sees one direction only cannot make its bias.
  params['blocks']['attn']['qkv'] = q.at[:, :, 0].set(q[:, :, 0, :1, :1])
  with small.on(), pytest.raises(Mistake, match='logits that differ by .*qkv_bias=False'):
    hf.save(tmp_path / 'out', shape, params, our_logits)
  assert not (tmp_path / 'out').exists()


def test_a_shape_that_they_have_not_is_refused():
  shape = their_models.SHAPES['gpt_neo']
  wide = dataclasses.replace(shape, n_heads=8)
  with pytest.raises(Mistake, match=r'n_heads · d_head: got 8 · 16 = 128, wanted d_model, 64'):
    hf.family_of(wide)
  with pytest.raises(Mistake, match=r'windows: got \[5, 7\], wanted one'):
    hf.family_of(dataclasses.replace(shape, windows=(5, 7)))
  assert hf.family_of(dataclasses.replace(shape, windows=(None, 24))) == 'gpt2'


def test_all_that_is_wrong_in_a_folder_is_told_at_once(tmp_path):
  their_models.make('gpt2').save_pretrained(tmp_path)
  tensors = load_file(tmp_path / hf.ONE)
  tensors['transformer.foreign'] = tensors.pop('transformer.h.1.ln_1.weight')
  tensors['transformer.wpe.weight'] = np.zeros((3, 3), np.float32)
  tensors['transformer.h.0.ln_1.bias'] = np.zeros(64, np.int32)
  save_file(tensors, tmp_path / hf.ONE)
  with pytest.raises(Mistake) as caught:
    hf.look(tmp_path)
  told = str(caught.value)
  assert '4 mistakes' in told
  assert 'h.1.ln_1.weight: got none, wanted (64,)' in told
  assert 'foreign: got (64,), wanted no such tensor' in told
  assert 'wpe.weight: got (3, 3) of F32, wanted (24, 64) of floats' in told
  assert 'h.0.ln_1.bias: got (64,) of I32' in told


def test_a_pickle_is_refused_unread(tmp_path):
  their_models.make('gpt2').save_pretrained(tmp_path)
  (tmp_path / hf.ONE).rename(tmp_path / 'pytorch_model.bin')
  with pytest.raises(Mistake, match=r'pytorch_model.bin, a pickle: reading it would run'):
    hf.look(tmp_path)


@pytest.mark.parametrize(
  'about, told',
  [
    ({'model_type': 'llama'}, 'model_type: got llama, wanted one of gpt2, gpt_neo'),
    ({'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx: got True'),
    ({'activation_function': 'relu'}, 'activation_function: got relu, wanted gelu_new'),
    ({'layer_norm_epsilon': 1e-6}, 'layer_norm_epsilon: got 1e-06'),
    ({'tie_word_embeddings': False}, 'tie_word_embeddings: got False'),
  ],
)
def test_another_model_is_refused(tmp_path, about, told):
  their_models.make('gpt2').save_pretrained(tmp_path)
  before = json.loads((tmp_path / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(before | about))
  with pytest.raises(Mistake, match=told):
    hf.look(tmp_path)


@pytest.mark.parametrize('cut', ['config.json', hf.ONE])
def test_a_folder_that_was_cut_is_told(tmp_path, cut):
  their_models.make('gpt2').save_pretrained(tmp_path)
  data = (tmp_path / cut).read_bytes()
  (tmp_path / cut).write_bytes(data[: len(data) // 2])
  with pytest.raises(Mistake, match=cut):
    hf.look(tmp_path)
