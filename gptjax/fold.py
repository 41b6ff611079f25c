"""A model with biases of q, k and v as the same function without them."""

import jax
import numpy as np

from gptjax.sizes import Shape


def fold(params: dict, shape: Shape) -> dict:
  """The same function of tokens, its q, k and v without biases.

  A bias of k is the same for all keys of a query, and the softmax does not see it; one of v is
  added to each mean of values, whatever the weights; one of q is a shift of what q's matrix is
  multiplied with, so of the norm's bias before it, and what that does to k and v likewise.
  """
  attn = {name: np.asarray(a, np.float64) for name, a in params['blocks']['attn'].items()}
  N, D = shape.n_layers, shape.d_model
  q_nda, _, v_nda = (attn['qkv'][:, :, c].reshape(N, D, -1) for c in range(3))
  bias_q, _, bias_v = (attn['qkv_bias'][:, c].reshape(N, -1) for c in range(3))
  out_nad = attn['out'].reshape(N, -1, D)
  # Few models are so unlucky that a matrix of theirs has no inverse; then some bias comes out.
  shift_nd = np.stack([np.linalg.lstsq(q.T, b)[0] for q, b in zip(q_nda, bias_q, strict=True)])
  value_na = bias_v - np.einsum('nd,nda->na', shift_nd, v_nda)
  out_bias = attn['out_bias'] + np.einsum('na,nad->nd', value_na, out_nad)
  norm_bias = np.asarray(params['blocks']['attn_norm']['bias'], np.float64) + shift_nd
  laid = lambda new, old: jax.device_put(new.astype(np.float32), old.sharding)
  was = params['blocks']
  bare = {name: a for name, a in was['attn'].items() if name != 'qkv_bias'}
  blocks = was | {
    'attn': bare | {'out_bias': laid(out_bias, bare['out_bias'])},
    'attn_norm': was['attn_norm'] | {'bias': laid(norm_bias, was['attn_norm']['bias'])},
  }
  return params | {'blocks': blocks}
