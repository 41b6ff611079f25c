"""The same model as PyTorch is usually written (nanoGPT), with our weights: to compare with.

It is built from a `Shape` and computes what `gptjax.model.GPT` computes: pre-LN blocks, GELU by
tanh, heads whose widths need not sum to d_model, dense and banded layers in turn, learned
positions, an output matrix that is the embedding. `tests/test_torch_gpt.py` shows that loss,
gradients and an update are equal. Nothing here imports JAX.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import flex_attention

from gptjax.sizes import Shape

NORM_EPS = 1e-5
# What a banded layer is given: the usual mask of booleans, or FlexAttention's blocks.
BANDS = ('mask', 'flex')


class Attention(nn.Module):
  """Multi-head self-attention; `scaled_dot_product_attention` chooses the kernel."""

  def __init__(self, shape: Shape, window: int | None):
    super().__init__()
    self.width = shape.n_heads * shape.d_head
    self.heads, self.window = shape.n_heads, window
    self.qkv = nn.Linear(shape.d_model, 3 * self.width, bias=shape.qkv_bias)
    self.out = nn.Linear(self.width, shape.d_model)

  def forward(self, x_bld, band):
    B, L, _ = x_bld.shape
    by_head = lambda y: y.view(B, L, self.heads, -1).transpose(1, 2)
    q_bhlk, k_bhsk, v_bhsk = map(by_head, self.qkv(x_bld).split(self.width, dim=2))
    if self.window is None or self.window >= L:
      o_bhlk = F.scaled_dot_product_attention(q_bhlk, k_bhsk, v_bhsk, is_causal=True)
    elif isinstance(band, flex_attention.BlockMask):
      o_bhlk = flex_attention.flex_attention(q_bhlk, k_bhsk, v_bhsk, block_mask=band)
    else:
      o_bhlk = F.scaled_dot_product_attention(q_bhlk, k_bhsk, v_bhsk, attn_mask=band)
    return self.out(o_bhlk.transpose(1, 2).reshape(B, L, self.width))


class Mlp(nn.Module):
  """Two matrices around GELU in its tanh approximation."""

  def __init__(self, shape: Shape):
    super().__init__()
    self.up = nn.Linear(shape.d_model, shape.d_ff)
    self.down = nn.Linear(shape.d_ff, shape.d_model)

  def forward(self, x_bld):
    return self.down(F.gelu(self.up(x_bld), approximate='tanh'))


class Block(nn.Module):
  """A pre-LN transformer block."""

  def __init__(self, shape: Shape, window: int | None):
    super().__init__()
    self.attn_norm = nn.LayerNorm(shape.d_model, NORM_EPS)
    self.attn = Attention(shape, window)
    self.mlp_norm = nn.LayerNorm(shape.d_model, NORM_EPS)
    self.mlp = Mlp(shape)

  def forward(self, x_bld, band):
    x_bld = x_bld + self.attn(self.attn_norm(x_bld), band)
    return x_bld + self.mlp(self.mlp_norm(x_bld))


class GPT(nn.Module):
  """Tokens and labels of whole contexts in, the mean cross-entropy in nats out."""

  def __init__(self, shape: Shape, bands: str = 'mask', device: str = 'cpu'):
    """With weights of no model yet: `load` brings some.

    Args:
      shape: of the model.
      bands: in BANDS.
      device: to run it on. Only blocks of FlexAttention cannot be moved there.
    """
    super().__init__()
    self.embed = nn.Embedding(shape.padded_vocab, shape.d_model)
    self.position = nn.Embedding(shape.context, shape.d_model)
    self.blocks = nn.ModuleList(Block(shape, shape.window(i)) for i in range(shape.n_layers))
    self.norm = nn.LayerNorm(shape.d_model, NORM_EPS)
    # Rows of the padding are never predicted, as with us. As a bias it costs no pass of its own.
    padding_v = torch.zeros(shape.padded_vocab)
    padding_v[shape.vocab_size :] = -torch.inf
    self.register_buffer('padding', padding_v, persistent=False)
    self.windows = {w for w in shape.windows if w and w < shape.context}
    if bands == 'mask':
      i_ls = torch.arange(shape.context)[:, None] - torch.arange(shape.context)
      for w in self.windows:
        self.register_buffer(f'band_{w}', (i_ls >= 0) & (i_ls < w), persistent=False)
    else:
      for w in self.windows:
        setattr(self, f'band_{w}', _blocks(shape.context, w, device))

  def forward(self, token_bl, label_bl):
    bands = {w: getattr(self, f'band_{w}') for w in self.windows}
    x_bld = self.embed(token_bl) + self.position.weight
    for block in self.blocks:
      x_bld = block(x_bld, bands.get(block.attn.window))
    logit_blv = F.linear(self.norm(x_bld), self.embed.weight, self.padding)
    return F.cross_entropy(logit_blv.flatten(0, 1), label_bl.flatten())


def _blocks(L, window, device):
  sees = lambda b, h, q, k: (q >= k) & (q - k < window)
  return flex_attention.create_block_mask(sees, None, None, L, L, device=device)


def matched(model: GPT, params: Mapping) -> Iterator[tuple[nn.Parameter, np.ndarray, bool]]:
  """Each parameter with the array of ours that it is, and whether it lies transposed.

  Args:
    model: theirs.
    params: nested dicts of ours as `Program.init` makes them, or others like them.
  """
  for name, part in params.items():
    if name != 'blocks':
      yield from _matched(model, {name: part})
  for i, block in enumerate(model.blocks):
    yield from _matched(block, params['blocks'], i)


def _matched(module, params, layer=None):
  for name, part in params.items():
    if isinstance(part, Mapping):
      yield from _matched(getattr(module, name), part, layer)
      continue
    # Ours are called qkv and qkv_bias, and in a norm scale and bias.
    owner = getattr(module, name.removesuffix('_bias'), module)
    owner = owner if isinstance(owner, nn.Module) else module
    parameter = owner.bias if name.endswith('bias') else owner.weight
    transposed = isinstance(owner, nn.Linear) and parameter.ndim == 2
    yield parameter, part if layer is None else part[layer], transposed


def load(model: GPT, params: Mapping) -> None:
  """Gives a model our weights."""
  with torch.no_grad():
    for parameter, array, transposed in matched(model, params):
      shape = parameter.shape[::-1] if transposed else parameter.shape
      value = torch.from_numpy(np.array(array, np.float32).reshape(shape))
      parameter.copy_(value.T if transposed else value)


def as_ours(model: GPT, params: Mapping, tensor: Callable = lambda p: p) -> dict:
  """What is asked of each parameter, as arrays in our layout.

  Args:
    model: theirs.
    params: ours, whose shapes the arrays get.
    tensor: what to take of a parameter; its gradient, say.
  """
  copied = _map(lambda array: np.empty_like(array), params)
  for parameter, array, transposed in matched(model, copied):
    value = tensor(parameter).detach().cpu()
    array[...] = (value.T if transposed else value).numpy().reshape(array.shape)
  return copied


def _map(function, params):
  return {
    k: _map(function, v) if isinstance(v, Mapping) else function(v) for k, v in params.items()
  }


@dataclasses.dataclass(frozen=True)
class Mode:
  """How a model is run."""

  dtype: str  # bfloat16: autocast
  compiled: bool
  bands: str = 'mask'


class Trainer:
  """Forward, backward, a clip of the gradient's norm, AdamW: as GPT-3 was trained, and nanoGPT."""

  def __init__(self, shape: Shape, params: Mapping, mode: Mode, device: str):
    """`device` is 'cpu' or 'cuda'; params are ours."""
    self.device = torch.device(device)
    self.mode = mode
    if device == 'cuda':
      torch.set_float32_matmul_precision('high')  # as XLA does on a GPU
    self.model = GPT(shape, mode.bands, device)
    load(self.model, params)
    self.model.to(self.device)
    self.loss = torch.compile(self.model) if mode.compiled else self.model
    matrices = [p for p in self.model.parameters() if p.ndim >= 2]
    rest = [p for p in self.model.parameters() if p.ndim < 2]
    groups = [{'params': matrices, 'weight_decay': 0.1}, {'params': rest, 'weight_decay': 0.0}]
    self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)

  def put(self, token_gbl: np.ndarray, rows: int) -> list[torch.Tensor]:
    """The first `rows` windows of a step on the device, slice by slice."""
    _, B, L = token_gbl.shape
    token_rl = torch.from_numpy(token_gbl.reshape(-1, L)[:rows].astype(np.int64))
    return [token_bl.to(self.device) for token_bl in token_rl.split(B)]

  def step(self, slices: list[torch.Tensor], lr: float) -> torch.Tensor:
    """One update at learning rate `lr`; the mean loss before it, which may still be computed."""
    for group in self.optimizer.param_groups:
      group['lr'] = lr
    self.optimizer.zero_grad(set_to_none=True)
    loss = self.backward(slices)
    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
    self.optimizer.step()
    return loss

  def backward(self, slices: list[torch.Tensor]) -> torch.Tensor:
    """Adds the gradient of the mean loss over all windows, and returns that loss."""
    rows, total = sum(map(len, slices)), 0.0
    for token_bl in slices:
      bf16 = self.mode.dtype == 'bfloat16'
      with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
        loss = self.loss(token_bl[:, :-1], token_bl[:, 1:])
      loss = loss * (len(token_bl) / rows)
      loss.backward()
      total += loss.detach()
    return total

  def synchronize(self) -> None:
    """Returns when all is computed."""
    if self.device.type == 'cuda':
      torch.cuda.synchronize()

  def peak_bytes(self) -> int | None:
    """The most memory that tensors had on a GPU; None on a CPU, where the process has it."""
    return torch.cuda.max_memory_allocated() if self.device.type == 'cuda' else None


def product(square: np.ndarray, dtype: str, device: str) -> Callable[[int], None]:
  """Something that multiplies a matrix by itself so many times, and waits."""
  a = torch.from_numpy(square).to(device, getattr(torch, dtype))

  def run(times):
    for _ in range(times):
      torch.matmul(a, a)
    if device == 'cuda':
      torch.cuda.synchronize()

  return run
