"""`block`: a part of a model whose adapters are whole experts, mixed after its nonlinearities.

A matmul can mix experts of its own. Experts of a feed-forward layer are mixed behind it:

.. math:: y = \\sum_e g_e(x) \\; f(\\mathrm{merge}_e(W), x)

with f the function that the user marks, W all its weights, and g what a router of one of its sites
publishes. Under `lift` the body of f runs mapped over the experts, so that work which does not
depend on the expert (x W of the first layer) is done once.

Reference: the form is that of MixLoRA, arXiv:2404.15159.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jlora.core import compat
from jlora.core.evaluate import evaluate
from jlora.core.lazy import SIDE, Lazy
from jlora.core.method import Method, Wrapper
from jlora.core.scope import Scope
from jlora.core.site import Arrays
from jlora.types import Dynamic

PREFIX = "jlora block "


def block(name: str, fn: Callable[..., Dynamic]) -> Callable[..., Dynamic]:
    """A function marked for methods whose experts are mixed on what it returns.

    Args:
      name: what `BlockMethod.block` refers to; one name may mark a block of every layer.
      fn: any function of arrays and weights. What it returns, floating arrays [..., n], is mixed.

    Returns:
      The same function, under `jax.jit`.
    """

    @functools.wraps(fn)
    def marked(*args: Dynamic, **kwargs: Dynamic) -> Dynamic:
        return fn(*args, **kwargs)

    marked.__name__ = PREFIX + name
    return jax.jit(marked)


@dataclasses.dataclass(frozen=True)
class BlockMethod(Wrapper):
    """Base of methods with E experts at every site of a block; `method` is one of them.

    A subclass provides `init`, `experts_of`, `mix` and, where its router sits at a site of the
    block, `expert`.
    """

    block: str = "block"  # the name that `jl.block` was given

    @property
    def merges(self) -> bool:
        return False

    def expert(self, p: Arrays) -> Method:
        """The method of one expert, on arrays of its own and those that all experts share.

        Args:
          p: the arrays of the site, [*stack, ...] by name.

        Returns:
          `method`, unless a subclass says otherwise.
        """
        return self.method

    def experts_of(self, p: Arrays) -> tuple[Arrays, Arrays]:
        """The arrays of one un-stacked site, those of each expert separate from the common ones.

        Args:
          p: the arrays of the site, by name.

        Returns:
          (arrays of each expert [E, ...], arrays that all experts share), as `expert` wants them.
        """
        raise NotImplementedError(f"{type(self).__name__}.experts_of")

    def mix(
        self, y: Float[jax.Array, "E *lead n"], ctx: Mapping[str, Dynamic]
    ) -> tuple[Float[jax.Array, "*lead n"], Arrays]:
        """The answers of the experts as one.

        Args:
          y: the answers, [E, ..., n].
          ctx: side inputs, and what the sites of the block, or those before it, published.

        Returns:
          ([..., n], reports by name).
        """
        raise NotImplementedError(f"{type(self).__name__}.mix")

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """Refuses a use outside of the block.

        Raises:
          ValueError: always; `mixed` runs the method of one expert instead.
        """
        raise ValueError(
            f"{type(self).__name__}: the weight is used outside of jl.block({self.block!r}, ...)"
        )


def mixed(scope: Scope, eqn: Dynamic, values: Sequence[Dynamic]) -> list[Dynamic] | None:
    """The outputs of a call that `block` marked.

    Args:
      scope: of the trace.
      eqn: a call.
      values: its operands.

    Returns:
      One array per output; None for other calls, or without such methods among the weights.

    Raises:
      ValueError: the sites have different numbers of experts, or what a site publishes depends on
        the
        expert.
    """
    called = str(eqn.params.get("name", ""))
    name = called.removeprefix(PREFIX)
    if scope.uses is not None or name == called:
        return None
    sites = {
        k: v
        for k, v in enumerate(values)
        if isinstance(v, Lazy) and isinstance(v.method, BlockMethod) and v.method.block == name
    }
    if not sites:
        return None
    apart = {k: _experts(w) for k, w in sites.items()}
    axes = {k: len(w.of("s")) for k, w in sites.items()}  # of the experts in their arrays
    sizes = {
        w.site.path: {t.shape[axes[k]] for t in apart[k][0].values()} for k, w in sites.items()
    }
    counts = {n for each in sizes.values() for n in each}
    if len(counts) != 1:
        raise ValueError(f"block {name!r}: got {sizes} experts, expected equal numbers")
    body = scope.fork()

    def run(experts, step):
        child, inside = body.child(step).inside(eqn), list(values)
        for k, own in experts.items():
            w, (_, common, method) = sites[k], apart[k]
            side = {SIDE + name: t for name, t in w.side().items()}
            inside[k] = w.replace(method=method, own={**common, **own, **side})
        out = [child.dense(v, eqn) for v in evaluate(child, compat.called(eqn), inside)]
        return out, child.aux, child.published

    experts = {k: own for k, (own, _, _) in apart.items()}
    steps = jnp.arange(counts.pop(), dtype=jnp.int32)
    try:
        out, aux, published = jax.vmap(run, (axes, 0), (0, 0, None))(experts, steps)
    except ValueError as error:
        if "out_axes" not in str(error):
            raise
        raise ValueError(
            f"block {name!r}: what a site publishes depends on the expert; its router has to be at "
            "a weight that meets what the block is given"
        ) from error
    scope.join(body, aux)
    scope.publish(published)
    mixer = next(iter(sites.values())).method
    assert isinstance(mixer, BlockMethod)
    ctx = {**scope.ctx, **scope.published}
    answers = [mixer.mix(y, ctx) for y in out]
    scope.report(name, answers[0][1])
    return [y.astype(v.aval.dtype) for (y, _), v in zip(answers, eqn.outvars, strict=True)]


def _experts(w: Lazy) -> tuple[Arrays, Arrays, Method]:
    """(arrays of each expert [*stack, E, ...], of all of them [*stack, ...], method of one)."""
    method = w.method
    assert isinstance(method, BlockMethod)
    p = w.parameters()
    return *method.experts_of(p), method.expert(p)
