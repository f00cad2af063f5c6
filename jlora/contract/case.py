"""What the laws of a method are tried on: a small model with a method, compiled once.

The model is a scan over two layers of two kernels [8, 12] and [12, 8]; methods of vectors adapt a
gain and a bias instead. Values and gradients of the lifted, merged and unrolled model come from
one compilation.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jlora.core import block as core
from jlora.core.adapter import Adapter
from jlora.core.lift import lift
from jlora.core.merge import merge
from jlora.core.method import Method
from jlora.core.site import Arrays
from jlora.core.sites import init
from jlora.io import NameMap
from jlora.types import Tree

PATTERN = "layers/(up|down)"
SHAPES = {"up": (8, 12), "down": (12, 8)}
VECTORS = "layers/(gain|bias)"  # what methods of vectors adapt, in a model that has these two
NAMES = NameMap(
    {
        r"layers/(up|down)": r"layer.{i}.\1",
        r"layers/gain": "layer.{i}.norm[weight]",
        r"layers/bias": "layer.{i}.norm[bias]",
    }
)

# Of a dtype, how far a value may be from float64's, relative to the largest: some roundings.
ROUNDING = {"float32": 1e-5, "bfloat16": 0.016, "float16": 0.002}

# Compile time is most of the run time: no effort is spent on code that runs once.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def layer(h: Float[Array, "b t d"], k: Arrays) -> jax.Array:
    """One layer, a residual block.

    Args:
      h: [b, t, 8].
      k: its kernels up [8, 12] and down [12, 8], and gain and bias [12] where the model has them.

    Returns:
      As h.
    """
    inner = jnp.tanh(h @ k["up"])
    if "gain" in k:
        inner = inner * k["gain"][None, None] + k["bias"][None, None]
    return h + inner @ k["down"]


block = core.block("block", layer)  # marked, for methods whose experts are mixed behind it


def scanned(params: Tree, x: Float[Array, "b t d"]) -> jax.Array:
    """The model.

    Args:
      params: layers by name, each with a leading axis of two layers, and head [8, 8].
      x: [b, t, 8].

    Returns:
      As x.
    """
    h, _ = jax.lax.scan(lambda h, k: (block(h, k), None), x, params["layers"])
    return h @ params["head"]


def unrolled(params: Tree, x: Float[Array, "b t d"]) -> jax.Array:
    """The model without scan.

    Args and Returns are those of `scanned`.
    """
    for i in range(2):
        x = block(x, {name: w[i] for name, w in params["layers"].items()})
    return x @ params["head"]


def projected(params: Tree, x: Float[Array, "b t d"]) -> jax.Array:
    """The kernels of both layers alone, in the dtype of x.

    Args:
      params: up [2, 8, 12].
      x: [b, t, 8].

    Returns:
      [b, t, 2, 12].
    """
    return jnp.einsum("bti,lio->btlo", x, params["up"].astype(x.dtype))


def projected_apart(params: Tree, x: Float[Array, "b t d"]) -> jax.Array:
    """`projected` of methods that are mixed behind a block, each layer a block of its own.

    Args and Returns are those of `projected`.
    """
    one = core.block("block", lambda x, w: x @ w.astype(x.dtype))
    return jnp.stack([one(x, params["up"][i]) for i in range(2)], axis=2)


def scaled(params: Tree, x: Float[Array, "b t d"]) -> jax.Array:
    """The gains of both layers alone, in the dtype of x.

    Args:
      params: gain [2, 12].
      x: [b, t, 8].

    Returns:
      [b, t, 2, 12].
    """
    return x[..., :1, None] * params["gain"].astype(x.dtype)[None, None]


def draw(seed: int, *shape: int) -> jax.Array:
    """Normal numbers of deviation 1/3.

    Args:
      seed: of the draw.
      shape: of the array.

    Returns:
      float32.
    """
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 3, jnp.float32)


def close(got: Tree, want: Tree, tol: float = 1e-4, what: str = "") -> None:
    """Asserts that two trees are equal up to rounding.

    Args:
      got: a tree of arrays.
      want: another one, compared in float64.
      tol: relative to the largest entry of each leaf.
      what: said where they are not equal.
    """
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        np.testing.assert_allclose(g, w, rtol=0, atol=tol * (1e-3 + np.abs(w).max()), err_msg=what)


def cast(tree: Tree, dtype: DTypeLike) -> Tree:
    """A tree with its floating arrays in another dtype.

    Args:
      tree: a tree of arrays.
      dtype: of the floating ones.

    Returns:
      The tree, of NumPy arrays where they are cast: nothing is compiled for that.
    """
    floating = lambda t: jnp.issubdtype(t.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda t: np.asarray(t).astype(dtype) if floating(t) else t, tree)


class Case:
    """One method on the model; what several laws need is computed once.

    `lift` and `merge` can be replaced, to see the laws about the library itself fail; `options`
    are the compiler's.
    """

    def __init__(
        self,
        method: Method,
        lift: Callable = lift,
        merge: Callable = merge,
        options: Mapping[str, bool | int | str] = FAST_COMPILE,
    ) -> None:
        self.method, self.lift, self.merge = method, lift, merge
        self.jit = functools.partial(jax.jit, compiler_options=dict(options))
        self.x, self.target = draw(0, 4, 5, 8), draw(1, 4, 5, 8)
        self.ctx = {
            "tokens": draw(2, 4, 5) > 0,
            "hidden": draw(3, 4, 5, 6),
            "user": draw(4, 4, 5, 3),
        }
        layers = {name: draw(10 + k, 2, *s) for k, (name, s) in enumerate(SHAPES.items())}
        self.pattern = PATTERN
        if type(method).vectors:
            self.pattern = VECTORS
            layers |= {"gain": 1 + draw(12, 2, 12), "bias": draw(13, 2, 12)}
        self.params = {"layers": layers, "head": draw(20, 8, 8)}

    def adapter(self, seed: int, noise: float, method: Method | None = None) -> Adapter:
        """A fresh adapter, moved.

        Args:
          seed: of its initialisation and of the noise.
          noise: deviation of the normal numbers that are added to everything trainable.
          method: None: that of the case.

        Returns:
          The adapter.
        """
        methods = {self.pattern: method or self.method}
        fresh = init(jax.random.key(seed), scanned, self.params, self.x, methods=methods)
        rng = np.random.default_rng(seed)

        def move(t: jax.Array) -> jax.Array:
            return t + jnp.asarray(noise * rng.normal(size=t.shape), t.dtype)

        return fresh.replace(trainable=jax.tree.map(move, fresh.trainable))

    def forward(
        self,
        adapter: Tree,
        x: Float[Array, "b t d"] | None = None,
        params: Tree = None,
        model: Callable = scanned,
    ) -> jax.Array:
        """The lifted model.

        Args:
          adapter: any of the model.
          x: None: that of the case.
          params: None: those of the case.
          model: which one is lifted.

        Returns:
          Its output, with the side inputs of the case.
        """
        x = self.x if x is None else x
        params = self.params if params is None else params
        return self.lift(model)(params, adapter, x, ctx=self.ctx)

    def step(self, run: Callable) -> Callable:
        """Loss and gradients of a model.

        Args:
          run: adapter -> y.

        Returns:
          adapter -> ((loss, y), gradients of everything trainable).
        """

        def loss(trainable, adapter):
            y = run(adapter.replace(trainable=trainable))
            return jnp.mean((y - self.target) ** 2), y

        return lambda adapter: jax.value_and_grad(loss, has_aux=True)(adapter.trainable, adapter)

    @functools.cached_property
    def fresh(self) -> Adapter:
        """An adapter that was not trained."""
        return self.adapter(0, 0.0)

    @functools.cached_property
    def noisy(self) -> tuple[Adapter, Adapter]:
        """Two adapters, of another alpha where there is one."""
        other = {"alpha": 5.0} if hasattr(self.method, "alpha") else {}
        return self.adapter(1, 0.3), self.adapter(2, 0.3, dataclasses.replace(self.method, **other))

    @functools.cached_property
    def merges(self) -> bool:
        """Whether the method has a merged weight."""
        try:
            jax.eval_shape(lambda a: self.merge(self.params, a), self.fresh)
        except NotImplementedError:
            return False
        return True

    @functools.cached_property
    def everything(self) -> Callable:
        """Compiled: adapter -> {"lifted", "unrolled", perhaps "merged": ((loss, y), gradients)}."""

        def run(adapter):
            out = {"lifted": self.step(self.forward)(adapter)}
            out["unrolled"] = self.step(lambda a: self.forward(a, model=unrolled))(adapter)
            if self.merges:
                merged = self.step(lambda a: scanned(self.merge(self.params, a), self.x))
                out["merged"] = merged(adapter)
            return out

        return self.jit(run)

    @functools.cached_property
    def values(self) -> list[dict[str, Tree]]:
        """`everything` of both noisy adapters."""
        return [self.everything(a) for a in self.noisy]
