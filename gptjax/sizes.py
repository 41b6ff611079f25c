"""The shape of a model, GPT-3's table of them, and what a shape costs in parameters and FLOPs."""

import dataclasses

VOCAB_MULTIPLE = 128  # a row of the TPU's matrix unit; and 50304 / 128 = 393 leaves room for tensor


@dataclasses.dataclass(frozen=True)
class Shape:
  """What makes two models differ in their arrays or in what they compute from them.

  `windows` is one period of the attention pattern: None for a dense layer, w for a banded one,
  in which query i sees keys i-w+1 … i. `n_heads * d_head` need not be `d_model`.
  """

  n_layers: int
  d_model: int
  n_heads: int
  d_head: int
  d_ff: int
  context: int
  vocab_size: int
  windows: tuple[int | None, ...]
  qkv_bias: bool = True  # of q, k and v; GPT-Neo has none

  @property
  def padded_vocab(self) -> int:
    """Rows of the embedding: the vocabulary and zero rows that are never predicted."""
    return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

  def window(self, layer: int) -> int | None:
    """The window of a layer, counted from 0."""
    return self.windows[layer % len(self.windows)]

  @property
  def n_params(self) -> int:
    """Parameters, counting the real rows of the vocabulary only."""
    D, A = self.d_model, self.n_heads * self.d_head
    attention = 3 * (D * A + A * self.qkv_bias) + A * D + D
    mlp = 2 * D * self.d_ff + self.d_ff + D
    layer_norm = 2 * D
    block = attention + mlp + 2 * layer_norm
    return (self.vocab_size + self.context) * D + self.n_layers * block + layer_norm

  def keys_seen(self, window: int | None) -> float:
    """Keys that a query sees in a layer, averaged over the positions of a full context."""
    L = self.context
    w = L if window is None else min(window, L)
    return (w * (w + 1) / 2 + (L - w) * w) / L

  @property
  def forward_flops(self) -> float:
    """FLOPs per token of a forward pass: two for each multiply-add of a matrix product.

    Attention counts the keys that are seen, so the causal half and the band are not credited
    with work that need not be done. Embedding look-ups, norms and softmax count nothing
    (Kaplan et al. 2020, table 1; Chowdhery et al. 2022, appendix B).
    """
    D, A = self.d_model, self.n_heads * self.d_head
    matrices = self.n_layers * (4 * D * A + 2 * D * self.d_ff) + self.vocab_size * D
    seen = sum(self.keys_seen(self.window(i)) for i in range(self.n_layers))
    return 2 * matrices + 2 * 2 * A * seen

  @property
  def train_flops(self) -> float:
    """FLOPs per token of a training step without recompute: the backward pass is two forwards."""
    return 3 * self.forward_flops


@dataclasses.dataclass(frozen=True)
class Gpt3Row:
  """A row of Table 2.1 of Brown et al. 2020, with the ramp that the paper leaves to the model."""

  n_layers: int
  d_model: int
  n_heads: int
  d_head: int
  batch: int  # sequences of 2048 tokens
  peak_lr: float
  ramp_tokens: float  # the paper: "the first 4-12 billion tokens depending on the model size"


# Brown et al. 2020, Table 2.1, as printed. Two rows contradict themselves: xl has 24·128 = 3072
# where d_model is 2048, 13b has 40·128 = 5120 where d_model is 5140. Their self-consistent
# variants are xl-16h (16 heads give the 1.3 B of its name) and 13b-5120. The batch of 175b is
# 3.2 M tokens, 1562.5 sequences, rounded to a number that meshes divide.
GPT3 = {
  '125m': Gpt3Row(12, 768, 12, 64, 256, 6.0e-4, 4e9),
  '350m': Gpt3Row(24, 1024, 16, 64, 256, 3.0e-4, 4e9),
  '760m': Gpt3Row(24, 1536, 16, 96, 256, 2.5e-4, 4e9),
  'xl': Gpt3Row(24, 2048, 24, 128, 512, 2.0e-4, 8e9),
  'xl-16h': Gpt3Row(24, 2048, 16, 128, 512, 2.0e-4, 8e9),
  '2.7b': Gpt3Row(32, 2560, 32, 80, 512, 1.6e-4, 8e9),
  '6.7b': Gpt3Row(32, 4096, 32, 128, 1024, 1.2e-4, 12e9),
  '13b': Gpt3Row(40, 5140, 40, 128, 1024, 1.0e-4, 12e9),
  '13b-5120': Gpt3Row(40, 5120, 40, 128, 1024, 1.0e-4, 12e9),
  '175b': Gpt3Row(96, 12288, 96, 128, 1536, 0.6e-4, 12e9),
}
