"""Each way to multiply is an einsum: its values, its gradients, on any mesh."""

import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax import products, sharding
from tests import small

# Names, subscripts and sizes of the products of a block.
OF_A_BLOCK = {
  'qkv': 'bld,dchk->blchk',
  'out': 'blhk,hkd->bld',
  'up': 'bld,df->blf',
  'down': 'blf,fd->bld',
}
SIZES = {'b': 4, 'l': 6, 'd': 16, 'c': 3, 'h': 4, 'k': 6, 'f': 32}
MESHES = [{}, {'data': 2, 'fsdp': 2, 'tensor': 2}]


def operands(subscripts, seed=0, **sizes):
  random = np.random.default_rng(seed)
  rows, weight, _ = products.split(subscripts)
  shape = lambda dims: [(SIZES | sizes)[dim] for dim in dims]
  return random.normal(size=shape(rows)).astype('f'), random.normal(size=shape(weight)).astype('f')


def rounded(a):
  return np.asarray(jnp.asarray(a).astype('bfloat16').astype('float32'))


def on_mesh(multiply, subscripts, x, w):
  """The product of arrays laid on the mesh that is set, and the gradients of its squares' sum."""
  rows, weight, out = products.split(subscripts)
  x = jax.device_put(x, sharding.computed(rows))
  w = jax.device_put(w, sharding.stored(weight))
  # As the model does it: what is summed over tensor is each device's own sum at first.
  if out == 'bld':
    spread = lambda *a: sharding.scatter_positions(multiply, *a)
  else:
    spread = multiply
  product = lambda x, w: spread(subscripts, x, nnx.Param(w))
  squares = lambda x, w: (product(x, w).astype(jnp.float32) ** 2).sum()
  return map(np.asarray, (jax.jit(product)(x, w), *jax.jit(jax.grad(squares, (0, 1)))(x, w)))


@pytest.mark.parametrize('mesh', MESHES, ids=str)
@pytest.mark.parametrize('subscripts', OF_A_BLOCK.values())
@pytest.mark.parametrize(
  'multiply',
  [products.plainly, products.by_parts, products.in_bf16, products.in_f32],
  ids=lambda m: m.__name__,
)
def test_a_product_is_an_einsum_and_so_are_its_gradients(multiply, subscripts, mesh):
  x, w = operands(subscripts)
  rows, weight, out = products.split(subscripts)
  if multiply is products.in_bf16:
    x, w = rounded(x), rounded(w)
  want = np.einsum(subscripts, x, w)
  dy = rounded(2 * want) if multiply is products.in_bf16 else 2 * want
  with small.on(**mesh):
    got, dx, dw = on_mesh(multiply, subscripts, x, w)
  assert got.dtype == np.float32
  # Of bf16 the result is rounded too, once.
  np.testing.assert_allclose(
    got, want, rtol=2**-8 if multiply is products.in_bf16 else 1e-4, atol=1e-4
  )
  np.testing.assert_allclose(dx, np.einsum(f'{out},{weight}->{rows}', dy, w), rtol=1e-2, atol=1e-1)
  np.testing.assert_allclose(dw, np.einsum(f'{rows},{out}->{weight}', x, dy), rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize('length', [1, 5, 6])
def test_gradients_of_bf16_do_not_depend_on_an_even_length(length):
  subscripts = OF_A_BLOCK['up']
  x, w = operands(subscripts, l=length)
  with small.on():
    got = [*on_mesh(products.in_bf16, subscripts, rounded(x), rounded(w))]
    want = [*on_mesh(products.plainly, subscripts, rounded(x), rounded(w))]
  np.testing.assert_allclose(got[0], want[0], rtol=2**-8)  # it is rounded
  for a, b in zip(got[1:], want[1:], strict=True):
    assert np.abs(a - b).max() < 1e-2 * np.abs(b).max()


def test_bf16_is_multiplied_as_such_and_summed_in_f32():
  subscripts = OF_A_BLOCK['up']
  with small.on():
    compiled = jax.make_jaxpr(
      jax.grad(lambda x, w: products.in_bf16(subscripts, x, nnx.Param(w)).sum(), (0, 1))
    )(*operands(subscripts))
  dots = [e for e in eqns(compiled.jaxpr) if e.primitive.name == 'dot_general']
  assert len(dots) == 3
  for dot in dots:
    assert [v.aval.dtype for v in dot.invars] == [jnp.bfloat16] * 2
    assert [v.aval.dtype for v in dot.outvars] == [jnp.float32]


@pytest.mark.parametrize('subscripts', OF_A_BLOCK.values())
@pytest.mark.parametrize('multiply', [products.in_bf16, products.in_f32], ids=lambda m: m.__name__)
def test_a_cpu_has_the_first_operand_of_each_product_as_it_wants_it(multiply, subscripts):
  """Summed over its last dim. Of the plain einsum's gradients in f32 two are not."""
  x, w = operands(subscripts, b=1, l=128, d=64, h=8, k=32, f=256)
  with small.on():
    squares = lambda x, w: (multiply(subscripts, x, nnx.Param(w)) ** 2).sum()
    text = jax.jit(jax.grad(squares, (0, 1))).lower(x, w).compile().as_text()
  dots = re.findall(r'f32\[([\d,]+)\]\S* dot\(.*lhs_contracting_dims=\{([\d,]+)\}', text)
  assert len(dots) == 3
  assert all(summed == '1' for _, summed in dots)


def eqns(jaxpr):
  for e in jaxpr.eqns:
    yield e
    for sub in jax.extend.core.jaxprs_in_params(e.params):
      yield from eqns(sub)


@pytest.mark.parametrize('mesh', [{}, {'tensor': 2}, {'data': 2, 'tensor': 2}], ids=str)
@pytest.mark.parametrize('rows', [1, 4])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', OF_A_BLOCK)
def test_with_the_weight_first_it_is_the_same(name, dtype, rows, mesh):
  if rows < mesh.get('data', 1):
    pytest.skip('a row cannot be split')
  subscripts = OF_A_BLOCK[name]
  x, w = (jnp.asarray(a, dtype) for a in operands(subscripts, b=rows, l=1))
  dims, weight, out = products.split(subscripts)
  summed = sum(dim in dims for dim in weight)
  with small.on(**mesh):
    x = jax.device_put(x, sharding.computed(dims))
    laid = products.summed_last(name, jax.device_put(w, sharding.stored(weight)))
    assert laid.shape == (*w.shape[summed:], *w.shape[:summed])
    if out == 'bld':
      product = lambda x, w: sharding.scatter_positions(
        products.weight_first, subscripts, x, nnx.Param(w)
      )
    else:
      product = lambda x, w: products.weight_first(subscripts, x, nnx.Param(w))
    got = jax.jit(product)(x, laid)
  assert got.dtype == dtype
  want = np.einsum(subscripts, *(np.asarray(a, 'f') for a in (x, w)))
  tolerance = 1e-4 if dtype == 'float32' else 2e-2
  np.testing.assert_allclose(np.asarray(got, 'f'), want, rtol=tolerance, atol=10 * tolerance)
