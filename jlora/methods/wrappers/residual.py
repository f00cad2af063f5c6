r"""A method minus what it started as: the function is that of the base, wherever it starts.

=========  ===========================================================
p          the arrays of the wrapped method
p0         copies of those that are trained, frozen: `a0` of `a`, `b0` of `b`, ...
Δ(p)       the delta of the wrapped method, [d_in, d_out]
=========  ===========================================================

.. math:: W' = (W - \Delta(p_0)) + \Delta(p)

Initialisations that start from directions of the weight or of a gradient (PiSSA, OLoRA, CorDA,
LoRA-GA, NLoRA) subtract their start from the base, so that the function is what it was. Here the
base is not touched: what is subtracted is carried by the adapter, so one base serves this and any
other adapter at once. `jlora.inits` fills the arrays, and writes them back into a base or into
LoRA of rank 2r for other programs.

Init: that of the wrapped method, p0 = p, hence the identity.

Paper: Meng, Wang and Zhang 2024, PiSSA, arXiv:2404.02948 (the residual matrix).
Source: paper.
Deviates: frozen copies instead of an edited base.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jlora.core.method import Method, Wrapper, low_rank
from jlora.core.site import Arrays, InitContext, Site
from jlora.methods.low_rank.lora import LoRA
from jlora.system import System
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class Residual(Wrapper):
    """`method` minus what it started as.

    Raises:
      ValueError: a method without factors.
    """

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method) or type(self.method).factors is Method.factors:
            raise ValueError(f"Residual: expected a method with factors, got {self.method}")

    @property
    def rank_axes(self) -> Mapping[str, int]:  # type: ignore[override]
        """Those of the method, of the copies too."""
        axes = self.method.rank_axes
        return {**axes, **{f"{name}0": axis for name, axis in axes.items()}}

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """The method's own arrays, and frozen copies of the trained ones."""
        trainable, frozen = self.method.init(key, site, context)
        return trainable, {**frozen, **{f"{name}0": t for name, t in trainable.items()}}

    def start(self, p: Arrays) -> Arrays:
        """The arrays of the wrapped method at the start.

        Args:
          p: all arrays.

        Returns:
          p0 by the names of p.
        """
        return {name: p.get(f"{name}0", t) for name, t in self._own(p).items()}

    @staticmethod
    def _own(p: Arrays) -> Arrays:
        return {name: t for name, t in p.items() if not (name[-1] == "0" and name[:-1] in p)}

    def factors(self, p: Arrays) -> tuple[Array, Array]:
        """[u, u0] [d_in, 2 R] and [v; -v0] [2 R, d_out]."""
        now, then = self.method.factors(self._own(p)), self.method.factors(self.start(p))
        assert now is not None and then is not None
        u, v = (jnp.concatenate(pair, axis=k) for pair, k in
                (((now[0], then[0]), 1), ((now[1], -then[1]), 0)))  # fmt: skip
        return u, v

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> Array:
        """w + (Δ(p) - Δ(p0)); exactly w at the start."""
        zero = jnp.zeros_like(w)
        return w + (self.method.merge(zero, self._own(p)) - self.method.merge(zero, self.start(p)))

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x W + x [u, u0] [v; -v0] in one thin product, where its parts cancel at the start.

        A method with an `apply` of its own (dropout, reports) runs it, and x Δ(p0) is subtracted.
        """
        plain = type(self.method).apply is Method.apply
        if plain or (type(self.method) is LoRA and "key" not in ctx):
            return Method.apply(self, x, w, p, ctx)
        out = self.method.apply(x, w, self._own(p), ctx)
        y, *reports = out if isinstance(out, tuple) else (out,)
        then = self.method.factors(self.start(p))
        assert then is not None
        y = y - low_rank(x, *then).astype(y.dtype)
        return (y, *reports) if reports else y


SYSTEM = System(
    name="Residual",
    paper="Meng 2024, 2404.02948",
    symbol="Residual",
    evidence="exactly the base at the start; W - s a0 b0 + s a b against numpy",
    kind="component",
    examples=(Residual(LoRA(rank=2, alpha=3.0)),),
)
