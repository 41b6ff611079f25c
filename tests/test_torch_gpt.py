"""The model that ours is timed against is the same model: its loss, its gradients, its update."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch

from benchmarks import torch_gpt
from benchmarks.torch_gpt import Mode, Trainer
from gptjax.sizes import Shape
from tests import small

LR = np.float32(1e-2)
EAGER = Mode('float32', compiled=False)


@functools.cache
def start():
  """Params of the small shape with nothing at a special value, and a step's windows."""
  with small.on():
    params = jax.tree.map(np.asarray, small.init(small.program())['params'])
  random = np.random.default_rng(0)
  params = jax.tree.map(lambda a: a + 0.1 * random.standard_normal(a.shape, np.float32), params)
  params['embed'][small.SHAPE.vocab_size :] = 0
  return params, small.rows(2, 3)


@functools.cache
def ours(rows):
  """Loss, gradient, and params after one step of ours."""
  params, token_gbl = start()
  program = small.program()
  with small.on():
    token_gbl = small.put(token_gbl)
    state = {**small.init(program), 'params': small.laid(program, params)}
    loss, grads = jax.jit(program.gradients)(state['params'], token_gbl, 0, rows)
    after, _ = jax.jit(program.train_step)(state, token_gbl, 0, rows, LR)
  return jax.tree.map(np.asarray, (loss, grads, after['params']))


# 4: the second slice is not full.
@pytest.mark.parametrize('rows', [pytest.param(6, marks=pytest.mark.slow), 4])
def test_loss_gradients_and_a_step_are_ours(rows):
  params, token_gbl = start()
  loss, grads, after = ours(rows)
  trainer = Trainer(small.SHAPE, params, EAGER, 'cpu')
  slices = trainer.put(token_gbl, rows)
  assert trainer.backward(slices).item() == pytest.approx(float(loss), rel=1e-6)
  theirs = torch_gpt.as_ours(trainer.model, params, lambda p: p.grad)
  small.assert_close(theirs, grads, rtol=1e-4, atol=1e-6)
  assert trainer.step(slices, float(LR)).item() == pytest.approx(float(loss), rel=1e-6)
  # Adam moves by the sign of what is rounding alone, as is the gradient of k's bias.
  counts = lambda a: jax.tree.map(lambda a, g: np.where(np.abs(g) > 1e-5, a, 0), a, grads)
  theirs = torch_gpt.as_ours(trainer.model, params)
  small.assert_close(counts(theirs), counts(after), rtol=1e-5, atol=1e-5)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), counts(after), counts(params))
  assert min(jax.tree.leaves(moved)) > 0.5 * LR


@pytest.mark.parametrize('shape', [
  dataclasses.replace(small.SHAPE, windows=(None, 4)),
  dataclasses.replace(small.SHAPE, windows=(5, None)),
  dataclasses.replace(small.SHAPE, vocab_size=249),
])  # fmt: skip
def test_another_model_would_show(shape):
  params, token_gbl = start()
  token_gbl = np.minimum(token_gbl, 248)
  losses = []
  for each in (small.SHAPE, shape):
    trainer = Trainer(each, params, EAGER, 'cpu')
    losses.append(trainer.backward(trainer.put(token_gbl, 6)).item())
  assert abs(losses[0] - losses[1]) > 1e-4


def test_all_parameters_are_ours_and_come_back():
  params, _ = start()
  model = torch_gpt.GPT(small.SHAPE)
  torch_gpt.load(model, params)
  small.assert_close(torch_gpt.as_ours(model, params), params, 0, 0)
  matched = [parameter for parameter, _, _ in torch_gpt.matched(model, params)]
  assert sorted(map(id, matched)) == sorted(map(id, model.parameters()))


def test_without_biases_of_q_k_and_v_there_are_none():
  shape = dataclasses.replace(small.SHAPE, qkv_bias=False)
  with small.on():
    program = small.program(shape)
    params = jax.tree.map(np.asarray, jax.jit(program.init)(jax.random.key(0))['params'])
  model = torch_gpt.GPT(shape)
  torch_gpt.load(model, params)
  count = sum(p.numel() for p in model.parameters())
  assert count == shape.n_params + (shape.padded_vocab - shape.vocab_size) * shape.d_model


def test_a_band_of_blocks_is_the_band_of_the_mask():
  params, token_gbl = start()
  losses = []
  for bands in torch_gpt.BANDS:
    trainer = Trainer(small.SHAPE, params, dataclasses.replace(EAGER, bands=bands), 'cpu')
    (token_bl,) = trainer.put(token_gbl[:1], 3)
    with torch.no_grad():  # FlexAttention has no backward pass on the CPU
      losses.append(trainer.loss(token_bl[:, :-1], token_bl[:, 1:]).item())
  assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_bf16_is_autocast_and_near():
  params, token_gbl = start()
  trainer = Trainer(small.SHAPE, params, Mode('bfloat16', compiled=False), 'cpu')
  loss = trainer.step(trainer.put(token_gbl, 6), float(LR)).item()
  assert loss != float(ours(6)[0])
  assert loss == pytest.approx(float(ours(6)[0]), rel=5e-3)
  assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@pytest.mark.slow
def test_compiled_is_eager():
  params, token_gbl = start()
  losses = []
  for compiled in (False, True):
    trainer = Trainer(small.SHAPE, params, Mode('float32', compiled), 'cpu')
    slices = trainer.put(token_gbl, 6)
    losses.append([trainer.step(slices, float(LR)).item() for _ in range(3)])
  assert losses[1] == pytest.approx(losses[0], rel=1e-5)
  assert losses[0][2] < losses[0][0]


def test_a_window_as_long_as_the_context_is_dense():
  params, token_gbl = start()
  L = small.SHAPE.context
  losses = []
  for windows in ((None,), (L,), (L + 1,)):
    shape: Shape = dataclasses.replace(small.SHAPE, windows=windows)
    trainer = Trainer(shape, params, EAGER, 'cpu')
    losses.append(trainer.backward(trainer.put(token_gbl, 6)).item())
  assert losses[0] == losses[1] == losses[2]
