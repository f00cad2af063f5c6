"""An adapter that acts on some tokens only: any method behind a mask that comes with the batch.

Symbols: the wrapped method's output f(x) -> `method.apply`; mask c -> `ctx[name]`, of the shape of
the tokens, True (or 1) where the adapter acts; values between 0 and 1 mix.

.. math::
    y_t = c_t \\, f(x_t) + (1 - c_t) \\, x_t W

With c the tokens from an invocation sequence on this is Activated LoRA (whose prefix then shares
the base model's cache); with c the image, prompt or padding mask, the region-bound variants. The
delta depends on more than x, so there is no merged weight.

Greenewald et al., `Activated LoRA <https://arxiv.org/abs/2504.12397>`_, 2025.

Source: abstract of the paper, and its variant in PEFT 0.21, for which tokens are active.
Deviates: the mask is an input, any mask; `jl.io.invoked` finds the invocation tokens.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from jlora.core.matmul import Weight
from jlora.core.method import Wrapper
from jlora.core.site import Arrays
from jlora.methods.low_rank.lora import LoRA
from jlora.system import System
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class TokenMask(Wrapper):
    """`method`, where `ctx[name]` says so.

    `invocation` is for whoever makes the mask and for files: the token sequence from which on an
    Activated LoRA acts; () for other masks. The function does not depend on it.
    """

    name: str = "tokens"
    invocation: tuple[int, ...] = dataclasses.field(default=(), compare=False)

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]; reports of the wrapped method are passed on.

        Raises:
          ValueError: no `ctx[name]`, or one of another shape than the tokens of x.
        """
        if self.name not in ctx:
            raise ValueError(f"TokenMask: ctx has no {self.name!r}; got {sorted(ctx)}")
        base = _Once(w, x)
        out = self.method.apply(x, base, p, ctx)
        tuned, *reports = out if isinstance(out, tuple) else (out,)
        mask = jnp.asarray(ctx[self.name])
        if mask.shape != tuned.shape[:-1]:
            raise ValueError(
                f"TokenMask: ctx[{self.name!r}] expected shape {tuned.shape[:-1]}, got {mask.shape}"
            )
        plain, mask = x @ base, mask[..., None]
        if mask.dtype == jnp.bool_:
            y = jnp.where(mask, tuned, plain)
        else:
            y = plain + mask.astype(tuned.dtype) * (tuned - plain)
        return (y, *reports) if reports else y


class _Once(Weight):
    """`w` that remembers x @ w, so that masked and unmasked tokens share one matmul."""

    def __init__(self, w: Weight, x: Dynamic) -> None:
        self.__dict__.update(w.__dict__)
        self._first, self._y = x, None

    def __rmatmul__(self, x: Dynamic) -> Dynamic:
        if x is not self._first:
            return super().__rmatmul__(x)
        if self._y is None:
            self._y = super().__rmatmul__(x)
        return self._y


SYSTEM = System(
    name="TokenMask",
    paper="Greenewald 2025, 2504.12397",
    symbol="TokenMask",
    evidence="one shared matmul",
    kind="composition",
    examples=(TokenMask(LoRA(rank=2)),),
    breaks={
        "L3": "the delta depends on the activation, so there is no merged weight",
    },
)
