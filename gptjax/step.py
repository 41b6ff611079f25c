"""The pure functions of training: the state, and one step of it."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from gptjax import compiler, pipeline, products, sharding, stability
from gptjax.cache import Cache
from gptjax.loss import cross_entropy, logits, next_logits, token_losses
from gptjax.model import GPT, Numerics
from gptjax.optimizer import AdamW
from gptjax.sizes import Shape
from gptjax.stability import Guard


@dataclasses.dataclass(frozen=True)
class Batch:
  """The windows of a step in slices [g, b, context + 1], of which the first `rows` rows count."""

  token_gbl: jax.Array
  start: jax.Array  # sequences consumed before
  rows: jax.Array

  @property
  def slices(self) -> jax.Array:
    """How many there are with rows that count."""
    G, B, _ = self.token_gbl.shape
    return jnp.minimum(-(-self.rows // B), G)

  def tokens(self, g: jax.Array) -> jax.Array:
    """Of slice g [b, context + 1]; any for one that there is not."""
    return lax.dynamic_index_in_dim(self.token_gbl, g, keepdims=False)

  def weights(self, g: jax.Array) -> jax.Array:
    """Of its rows [b]: 1 for one that counts, 0 for one that fills a slice or is in none."""
    row_b = self._rows(g)
    return ((row_b >= 0) & (row_b < self.rows)).astype(jnp.float32)

  def sequences(self, g: jax.Array) -> jax.Array:
    """The place of its rows in the stream [b]."""
    return self.start + self._rows(g)

  def _rows(self, g):
    B = self.token_gbl.shape[1]
    return g * B + jnp.arange(B, out_sharding=sharding.computed('b'))


@dataclasses.dataclass(frozen=True)
class Program:
  """What is compiled. Its methods are pure and want a mesh set around them.

  A state is `{'params': …, 'moments': {'mu': …, 'nu': …, 'count': …}, 'health': …}`, nested dicts
  of arrays, those of params and moments in f32 and in a layout that depends on the shape alone.
  """

  shape: Shape
  numerics: Numerics
  optimizer: AdamW
  loss_chunk: int  # positions whose logits are held at a time
  seed: int
  guard: Guard

  def init(self, key: jax.Array) -> dict:
    """A new state."""
    return self.begin(nnx.to_pure_dict(nnx.state(GPT(self.shape, key=key))))

  def begin(self, params: dict) -> dict:
    """A state that begins with these params."""
    return {
      'params': params,
      'moments': self.optimizer.init(params),
      'health': self.guard.init(),
    }

  def abstract_state(self) -> dict:
    """The state's shapes, dtypes and shardings on the mesh that is set; costs no memory."""
    return sharding.concrete(jax.eval_shape(lambda: self.init(jax.random.key(0))))

  def model(self, params: dict) -> GPT:
    """GPT on plain params, of which the blocks may be some of them, or a tuple of all, apart."""
    graph, _ = nnx.split(jax.eval_shape(lambda: GPT(self.shape, key=jax.random.key(0))))
    if not isinstance(params['blocks'], tuple):
      return nnx.merge(graph, params)
    models = [nnx.merge(graph, params | {'blocks': block}) for block in params['blocks']]
    models[0].blocks = nnx.List([model.blocks for model in models])
    return models[0]

  def hidden(self, params: dict, token_bl: jax.Array, key_b=None) -> tuple[jax.Array, jax.Array]:
    """Final hidden states [b, l, d] and the output matrix [v, d] in use."""
    x_bld, e_vd, _ = self.model(params)(token_bl.astype(jnp.int32), self.numerics, key_b)
    return x_bld, e_vd

  def loss(self, params: dict, token_bl: jax.Array, weight_b: jax.Array, key_b=None) -> jax.Array:
    """Cross-entropy in nats summed over the tokens of rows, each row weighted.

    Args:
      params: of the state.
      token_bl: windows of context + 1 tokens: inputs and, one later, labels.
      weight_b: 1 for a row that counts, 0 for one that fills a slice.
      key_b: one PRNG key a row, for dropout.
    """
    hidden = self.hidden(params, token_bl[:, :-1], key_b)
    return self.cross_entropy(*hidden, token_bl, weight_b)

  def cross_entropy(self, x_bld, e_vd, token_bl, weight_b) -> jax.Array:
    """The loss, given final hidden states and the output matrix in use."""
    label_bl = token_bl[:, 1:].astype(jnp.int32)
    weight_bl = weight_b[:, None] * jnp.ones_like(label_bl, jnp.float32)
    return cross_entropy(
      x_bld,
      e_vd,
      label_bl,
      weight_bl,
      self.shape.vocab_size,
      self.loss_chunk,
      self.numerics.dtype,
    )

  def token_losses(self, params: dict, token_bl: jax.Array) -> jax.Array:
    """Cross-entropy in nats [b, l - 1] of each token but the first of its row."""
    x_bld, e_vd = self.hidden(params, token_bl[:, :-1])
    x_bld, e_vd = (a.astype(self.numerics.dtype) for a in (x_bld, e_vd))
    return token_losses(x_bld, e_vd, token_bl[:, 1:], self.shape.vocab_size, self.loss_chunk)

  def logits(self, params: dict, token_bl: jax.Array) -> jax.Array:
    """Logits [b, l, padded vocabulary] in f32 of the token after each; the padding has -inf."""
    operands = (a.astype(self.numerics.dtype) for a in self.hidden(params, token_bl))
    return logits(*operands, self.shape.vocab_size)

  def read(self, params: dict, token_bl: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Logits [padded vocabulary, b] in f32 of the token after the last, and the cache after it.

    Args:
      params: as `to_read` gives them, with this program.
      token_bl: the tokens that follow what the cache knows.
      cache: of the tokens before.
    """
    x_bld, e_vd, cache = self.model(params)(token_bl, self.numerics, None, cache)
    return next_logits(x_bld[:, -1], e_vd, self.shape.vocab_size), cache

  def gradients(
    self, params: dict, token_gbl: jax.Array, start: jax.Array, rows: jax.Array
  ) -> tuple[jax.Array, dict]:
    """The mean loss in nats per token over the first `rows` rows, and its gradient in f32.

    Args:
      params: of the state.
      token_gbl: windows of context + 1 tokens in slices g of b, in order along g and b.
      start: sequences consumed before.
      rows: how many rows count; later ones weigh 0. It is traced, as is the number of slices that
        it takes, so a batch ramp compiles once.
    """
    total, grads, tokens = self.sums(params, Batch(token_gbl, start, rows))
    return total / tokens, jax.tree.map(lambda g: g / tokens, grads)

  def sums(self, params: dict, batch: Batch) -> tuple[jax.Array, dict, jax.Array]:
    """The loss in nats and its gradient in f32, summed over the tokens that count; their count."""
    summed = self._through_stages if sharding.stages() > 1 else self._slice_by_slice
    tokens = batch.rows * (batch.token_gbl.shape[2] - 1)
    return *summed(params, batch), tokens.astype(jnp.float32)

  def _slice_by_slice(self, params, batch):
    """The loss summed over tokens, and its gradient."""
    deferred = sharding.defer(params)

    def add(g, sums):
      token_bl, weight_b = batch.tokens(g), batch.weights(g)
      key_b = self._row_keys(batch.sequences(g))
      value, grads = jax.value_and_grad(self.loss)(deferred, token_bl, weight_b, key_b)
      return sums[0] + value, jax.tree.map(jnp.add, sums[1], grads)

    zeros = jnp.float32(0), sharding.deferred_zeros(deferred)
    if len(batch.token_gbl) == 1:  # nothing to loop over, and XLA then adds to no zeros
      total, grads = add(0, zeros)
    else:
      total, grads = lax.fori_loop(0, batch.slices, add, zeros)
    return total, sharding.reduce(grads)

  def _through_stages(self, params, batch):
    """The same, by a pipeline."""
    parts, outer, blocks = self._parts(params, batch)
    total, d_outer, d_blocks = pipeline.one_f_one_b(parts, outer, blocks, batch.slices)
    d_embed = sharding.take_back(d_outer.pop('embed'), params['embed'])
    return total, sharding.reduce(d_outer | {'blocks': d_blocks}) | {'embed': d_embed}

  def _parts(self, params, batch, dropped=True):
    """What a pipeline runs, and what it runs on: params outside and inside its stages."""
    blocks = params['blocks']
    outer = {name: w for name, w in params.items() if name not in ('blocks', 'embed')}
    outer = sharding.defer(outer) | {'embed': sharding.use_for_long(params['embed'])}
    keys = lambda g: self._row_keys(batch.sequences(g)) if dropped else None

    def first(outer, g):
      model, token_bl = self.model(outer | {'blocks': blocks}), batch.tokens(g)[:, :-1]
      e_vd = model.output(self.numerics)
      return model.start(e_vd, token_bl.astype(jnp.int32), self.numerics, keys(g))

    def layers(blocks, x_btd, g, number):
      model = self.model(params | {'blocks': blocks})
      return model.run_layers(x_btd, self.numerics, keys(g), number)

    def last(outer, x_btd, g):
      model = self.model(outer | {'blocks': blocks})
      x_bld, e_vd = model.finish(x_btd, self.numerics), model.output(self.numerics)
      return self.cross_entropy(x_bld, e_vd, batch.tokens(g), batch.weights(g))

    return pipeline.Parts(first, layers, last), outer, blocks

  def train_step(
    self, state: dict, token_gbl: jax.Array, start: jax.Array, rows: jax.Array, lr: jax.Array
  ) -> tuple[dict, dict]:
    """One update of the state at learning rate `lr`; the other arguments are of `gradients`.

    A step that the guard finds bad leaves params and moments as they were, bit for bit.

    Returns:
      The new state, and as metrics in f32 the mean loss in nats per token and the global norms
      of the gradient (before its clip), of the update and of the new parameters; and as int32
      what the guard judged, how many bad steps there were in a row, and where the first began.
    """
    params = state['params']
    total, grads, tokens = self.sums(params, Batch(token_gbl, start, rows))
    loss, grad_norm = total / tokens, optax.tree.norm(grads) / tokens
    judged = self.guard.judge(state['health'], loss, grad_norm)
    good = judged == stability.GOOD
    updates, moments = self.optimizer.update(
      grads, state['moments'], params, lr, grad_norm, good, tokens
    )
    # Not only an update of 0: -0 and 0 are 0, and a CPU makes 0 of what is nearly 0.
    params = stability.choose(good, optax.apply_updates(params, updates), params)
    new = {'params': params, 'moments': moments}
    updates, params = compiler.written(updates, params)
    health = self.guard.after(state['health'], judged, start, loss, grad_norm)
    metrics = {
      'loss': loss,
      'grad_norm': grad_norm,
      'update_norm': optax.tree.norm(updates),
      'param_norm': optax.tree.norm(params),
      'judged': judged,
      'streak': health['streak'],
      'since': health['since'],
    }
    return new | {'health': health}, metrics

  def eval_step(self, params: dict, token_gbl: jax.Array, rows: jax.Array) -> jax.Array:
    """The loss in nats summed over the tokens of the first `rows` rows, without dropout."""
    batch = Batch(token_gbl, jnp.int32(0), rows)
    return self.forward_loss(params, batch, batch.slices)

  def forward_loss(self, params: dict, batch: Batch, slices: jax.Array | int) -> jax.Array:
    """The same of so many slices of a batch; with an int it can be differentiated."""
    if sharding.stages() > 1:
      return pipeline.gpipe(*self._parts(params, batch, dropped=False), slices)
    add = lambda g, total: total + self.loss(params, batch.tokens(g), batch.weights(g))
    return lax.fori_loop(0, slices, add, jnp.float32(0))

  def _row_keys(self, sequence_b):
    """A key a row that depends on the seed and the row's place in the stream alone."""
    if not self.numerics.dropout:
      return None
    key = jax.random.key(self.seed)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(sequence_b)


def to_read(
  program: Program, params: dict, platform: str, dtype: str | None = None
) -> tuple[Program, dict]:
  """A program and its params for reading token by token, which `Program.read` is for.

  Each block is apart, in the dtype of use, its matrices as `products.for_reading` wants them: a
  block cut out of [n, …] inside a program would be copied for every token, and cast again, and each
  takes as long as to multiply by it. Gives up the params array by array, so both are never there.

  Args:
    program: as the mesh that is set has it.
    params: of the state.
    platform: of the mesh.
    dtype: to compute in; None: the program's own.
  """
  dtype = jnp.dtype(dtype or program.numerics.dtype)
  multiply, lay = products.for_reading(platform)
  how = {'dtype': dtype, 'between': dtype, 'multiply': multiply}
  numerics = dataclasses.replace(program.numerics, **how)
  leaves, tree = jax.tree_util.tree_flatten_with_path(params.pop('blocks'))
  apart = []
  while leaves:
    path, a = leaves.pop(0)
    apart.append([lay(path[-1].key, a[i].astype(dtype)) for i in range(len(a))])
  laid = {name: jax.tree.map(lambda a: a.astype(dtype), params.pop(name)) for name in [*params]}
  laid['blocks'] = tuple(jax.tree.unflatten(tree, block) for block in zip(*apart, strict=True))
  return dataclasses.replace(program, numerics=numerics), laid
