r"""From one vector per site slice to the arrays of an adapter: the last layer of hypernetworks.

With :math:`h_t` the features of token t, a slice of site k (`jlora.generation.tokens.site_tokens`),
and one matrix and bias per site and name of an array, shared by the slices of the site:

.. math::
    \theta_{t,\mathrm{name}} = \mathrm{reshape}(W_{k,\mathrm{name}}\, h_t + w_{k,\mathrm{name}})

Names in ``zero`` start from a matrix of zeros. The others start uniform, with the size that a fresh
LoRA gives to ``a``: a mean square of 1 / d_in for features of unit mean square.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.generation.tokens.site_tokens import TokenSpec
from jlora.types import Tree


class Heads(nn.Module):
    """The matrices of all sites."""

    spec: TokenSpec  # layout of the adapter
    zero: tuple[str, ...] = ("b",)  # names of arrays that are zero at first

    @nn.compact
    def __call__(self, features: Float[Array, "T w"]) -> dict[str, dict[str, Array]]:
        out, row = {}, 0
        for group in self.spec.groups:
            own, leaves = features[row : row + group.count], {}
            for name, shape in group.leaves:
                start = nn.initializers.zeros_init()
                if name not in self.zero:
                    start = nn.initializers.variance_scaling(1 / shape[0], "fan_in", "uniform")
                size, label = int(np.prod(shape)), f"{group.path.replace('/', '.')}.{name}"
                leaf = nn.Dense(size, kernel_init=start, name=label)(own)
                leaves[name] = leaf.reshape(group.stack + shape).astype(self.spec.dtype)
            out[group.path] = leaves
            row += group.count
        return out


def draw(key: PRNGKeyArray, model: nn.Module, *args: Float[Array, "..."]) -> Tree:
    """Initial parameters of a hypernetwork, by its own initialisers.

    Args:
      key: of the draws.
      model: the module, unbound.
      args: what it is called with (shapes only).

    Returns:
      The tree of parameters, float32.
    """
    return _init(model, key, *args)["params"]


@functools.partial(jax.jit, static_argnums=0)
def _init(model: nn.Module, *args: Array) -> Tree:
    return model.init(*args)


class Residual(nn.Module):
    """A layer norm, an MLP of one hidden layer, and what came in added."""

    width: int
    ratio: int = 4  # hidden width over width

    @nn.compact
    def __call__(self, x: Float[Array, "T w"]) -> Float[Array, "T w"]:
        h = nn.Dense(self.ratio * self.width)(nn.LayerNorm()(x))
        return x + nn.Dense(self.width)(nn.gelu(h))


def mean_square(tree: Tree) -> Float[Array, ""]:
    """Mean of the squares of all numbers of a tree.

    Args:
      tree: of float arrays.

    Returns:
      A scalar.
    """
    leaves = jax.tree.leaves(tree)
    total = jnp.stack([jnp.sum(jnp.square(t.astype(jnp.float32))) for t in leaves])
    return jnp.sum(total) / sum(t.size for t in leaves)
