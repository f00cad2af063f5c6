r"""Optimizers that see both factors of a site at once: one site's rule, applied to all sites.

=========  ======================================================================
A, B       `a` [*stack, d_in, r] and `b` [*stack, r, d_out] of a site, trained
s          its `scale` [*stack], frozen; the delta is :math:`D = s A B`
G          the gradient of the loss with respect to D, [*stack, d_in, d_out]
g_A, g_B   the gradients that training gives: :math:`s\,G B^T` and :math:`s\,A^T G`
=========  ======================================================================

A rule is written for one site: ``init(a, b) -> state`` and ``update(pair, state) -> (u_A, u_B,
state)``, updates that are added after a sign and a learning rate. `per_site` makes an optax
transformation of it, to be placed first in a chain, where gradients are still raw (clipping by a
global norm before it changes what :math:`g_A` and :math:`g_B` are to each other only by a number).
The scale arrives as an extra argument: ``update(g, state, trainable, frozen=adapter.frozen)``.

All arithmetic is in float32; updates get the dtype of their parameters.

Source: Original to jlora; what each optimizer computes is in its own file.
Deviates: nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float

from jlora import numerics
from jlora.types import Tree

State = Tree  # what a rule keeps of one site


class Pair(NamedTuple):
    """The two factors of a site and their gradients, float32."""

    a: Float[Array, "*stack d_in r"]  # A
    b: Float[Array, "*stack r d_out"]  # B
    grad_a: Float[Array, "*stack d_in r"]  # g_A = s G B^T
    grad_b: Float[Array, "*stack r d_out"]  # g_B = s A^T G
    scale: Float[Array, "*stack 1 1"]  # s


Init = Callable[[Array, Array], State]
Update = Callable[[Pair, State], tuple[Array, Array, State]]


def per_site(
    name: str, init: Init, update: Update, fixed_a: bool = False
) -> optax.GradientTransformationExtraArgs:
    """An optax transformation of trees like `Adapter.trainable` from the rule of one site.

    Args:
      name: of the optimizer, for messages.
      init: (a, b) -> state of a site, a PyTree of arrays; both factors are float32.
      update: (pair, state) -> (update of a, update of b, state).
      fixed_a: whether A may be frozen (then `init` sees a zero A, and A has no update).

    Returns:
      A transformation whose state is {path: state of the site}. Its `update` requires the
      parameters and the extra argument `frozen`, in which every site has a `scale`.

    Raises:
      ValueError: at `init`, a site whose trained arrays are not `a` and `b`; at `update`, no
        parameters or no `frozen` are given.
    """

    def start(params: Tree) -> Tree:
        sites = _live(params).items()
        return {path: init(*_factors(name, path, site, fixed_a)) for path, site in sites}

    def step(
        updates: Tree, state: Tree, params: Tree | None = None, *, frozen: Tree = None, **_: object
    ) -> tuple[Tree, Tree]:
        if params is None or frozen is None:
            missing = "params" if params is None else "frozen"
            raise ValueError(
                f"{name}: update: got no {missing}, expected update(gradients, state, "
                "adapter.trainable, frozen=adapter.frozen)"
            )
        moved, kept = dict(updates), {}
        for path, site in _live(params).items():
            scale = jnp.asarray(frozen[path]["scale"], jnp.float32)[..., None, None]
            a, b = _factors(name, path, {**frozen[path], **site} if fixed_a else site, fixed_a)
            pair = Pair(a, b, *_factors(name, path, updates[path], fixed_a), scale)
            u_a, u_b, kept[path] = update(pair, state[path])
            factor_updates = {"a": u_a, "b": u_b}
            moved[path] = {n: factor_updates[n].astype(t.dtype) for n, t in site.items()}
        return moved, kept

    return optax.GradientTransformationExtraArgs(start, step)


def gram_a(a: Float[Array, "*stack d_in r"]) -> Float[Array, "*stack r r"]:
    """A^T A.

    Args:
      a: A.

    Returns:
      The Gram matrix of the columns of A.
    """
    return numerics.matmul(a.mT, a)


def gram_b(b: Float[Array, "*stack r d_out"]) -> Float[Array, "*stack r r"]:
    """B B^T.

    Args:
      b: B.

    Returns:
      The Gram matrix of the rows of B.
    """
    return numerics.matmul(b, b.mT)


def damped_inverse(gram: Float[Array, "*stack r r"], damping: float) -> Float[Array, "*stack r r"]:
    """The inverse of a Gram matrix plus `damping` times the identity.

    Args:
      gram: symmetric, positive semi-definite.
      damping: delta, positive: a zero B, which most adapters start with, has a Gram matrix of zero.

    Returns:
      (gram + delta I)^-1.
    """
    eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    return numerics.inv(gram + jnp.float32(damping) * jnp.broadcast_to(eye, gram.shape))


def _live(params: Tree) -> dict[str, Tree]:
    """The sites that have arrays here (`optax.partition` takes away those of other labels)."""
    return {path: site for path, site in params.items() if jax.tree.leaves(site)}


def _factors(name: str, path: str, site: Tree, fixed_a: bool) -> tuple[Array, Array]:
    if "b" not in site or not ({"a", "b"} >= set(site) - {"scale"}) or not (fixed_a or "a" in site):
        raise ValueError(
            f"{name}: {path}: got arrays {sorted(site)}, expected trained ['a', 'b']: methods "
            "whose delta is scale * a @ b"
        )
    b = site["b"].astype(jnp.float32)
    return site.get("a", jnp.zeros((*b.shape[:-2], 1, b.shape[-2]))).astype(jnp.float32), b
