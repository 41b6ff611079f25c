"""A model of Hugging Face is the same function here; what is wrong with it is told at once."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptjax import hf
from gptjax.errors import Mistake
from tests import small, their_models

TOKENS = their_models.TOKENS


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
    got = their_models.ours(folder.shape, params)
  np.testing.assert_allclose(got, their_models.logits(model, TOKENS), rtol=1e-4, atol=1e-4)


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
    ({'n_layer': 10**12}, 'n_layer: got 1000000000000, wanted a number from 1'),
    ({'n_embd': None, 'n_head': '4'}, '2 mistakes'),
    ({'n_head': 5}, 'n_embd: got 64, wanted a multiple of n_head, 5'),
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


def test_more_layers_than_there_are_cost_nothing(tmp_path):
  their_models.make('gpt_neo').save_pretrained(tmp_path)
  about = json.loads((tmp_path / 'config.json').read_text())
  about['attention_types'] = [[['global', 'local'], 10**12]]
  (tmp_path / 'config.json').write_text(json.dumps(about))
  with pytest.raises(Mistake, match='attention_types: got 2000000000000 layers, wanted 4'):
    hf.look(tmp_path)


@pytest.mark.parametrize(
  'types', [[[['global', 'banana'], 2]], [['abcd', 1]], [[['global'], 5], [['local'], -1]]]
)
def test_kinds_of_layers_are_named(types, tmp_path):
  their_models.make('gpt_neo').save_pretrained(tmp_path)
  about = json.loads((tmp_path / 'config.json').read_text()) | {'attention_types': types}
  (tmp_path / 'config.json').write_text(json.dumps(about))
  with pytest.raises(Mistake, match="wanted lists of 'global' and 'local'"):
    hf.look(tmp_path)


def test_of_many_mistakes_some_are_told(tmp_path):
  their_models.make('gpt2').save_pretrained(tmp_path)
  about = json.loads((tmp_path / 'config.json').read_text()) | {'n_layer': 5000}
  (tmp_path / 'config.json').write_text(json.dumps(about))
  with pytest.raises(Mistake, match='more mistakes') as caught:
    hf.look(tmp_path)
  assert len(str(caught.value)) < 10_000


def test_the_shortest_period_is_found_at_once():
  assert hf.period([None, 5] * 3 + [None]) == (None, 5)
  assert len(hf.period([None] * 9_999 + [5])) == 10_000


def test_weights_that_are_not_finite_are_refused(tmp_path):
  model = their_models.make('gpt2')
  model.transformer.h[1].ln_1.weight.data[3] = float('nan')
  model.save_pretrained(tmp_path)
  folder = hf.look(tmp_path)
  with small.on(), pytest.raises(Mistake, match='h.1.ln_1.weight: got NaN or infinity'):
    hf.load(folder, small.program(folder.shape).abstract_state()['params'])


def test_an_index_reads_nothing_outside_its_folder(tmp_path):
  their_models.make('gpt2').save_pretrained(tmp_path / 'a')
  (tmp_path / 'b').mkdir()
  shutil.copy(tmp_path / 'a' / 'config.json', tmp_path / 'b')
  outside = f'../a/{hf.ONE}'
  index = {'weight_map': {'transformer.wte.weight': outside, 'a': 1}}
  (tmp_path / 'b' / hf.INDEX).write_text(json.dumps(index))
  with pytest.raises(Mistake, match='missing, wanted safetensors'):
    hf.look(tmp_path / 'b')
