r"""Flexora: weights of layers, learned on validation rows, say which layers get LoRA at all.

==========  =================================================================================
theta       what LoRA trains, of all L layers
alpha       [L], logits of the layers, zero at the start
w           [L], weights of the layers' deltas: :math:`L\,\mathrm{softmax}(\alpha)`, 1 at the start
L_t, L_v    loss on training rows, and on validation rows
eta         learning rate of the inner step
==========  =================================================================================

.. math:: W_l' = W_l + w_l \, s A_l B_l, \qquad
          \theta \leftarrow \theta - \eta \nabla_\theta L_t(\theta, w), \qquad
          \alpha \leftarrow \mathrm{Adam}(\nabla_\alpha L_v)

The gradient of alpha is of *first order*, at theta as it is, or *unrolled* through one inner step:

.. math:: \nabla_\alpha L_v(\theta, w(\alpha)) \quad\text{or}\quad
          \nabla_\alpha L_v\big(\theta - \eta \nabla_\theta L_t(\theta, w(\alpha)), w(\alpha)\big)

Both alternate with steps of theta. Layers with a positive alpha (or the k largest) are then trained
as plain LoRA from a fresh start. A layer is one slice of a stack, or the first number in the path
of a site; the sites of a layer share its weight.

Paper: Wei et al. 2024, arXiv:2408.10774.
Source: paper (unrolled) and official code (first order).
Deviates: w multiplies the delta once; the official code's hook also meets the modules inside LoRA,
so that the delta is scaled by a power of w.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jlora.contracts.schedule import Schedule
from jlora.core.adapter import Adapter
from jlora.methods.low_rank.lora import LoRA
from jlora.schedules import ranks
from jlora.types import Dynamic, Tree

Layers = Mapping[str, tuple[int, ...] | int]  # path -> number of the layer, or of each slice


def layers_of(adapter: Adapter) -> dict[str, tuple[int, ...] | int]:
    """The layer of each site.

    Args:
      adapter: of any methods.

    Returns:
      path -> the numbers of the slices of a stack, or the first number in the path; layers are
      numbered from 0 without gaps, in their order.

    Raises:
      ValueError: a site that is no stack of one axis and has no number in its path; stacks of
        different lengths.
    """
    layers, stacks = {}, {site.stack for site, _ in adapter.sites if site.stack}
    if len(stacks) > 1 or any(len(stack) > 1 for stack in stacks):
        raise ValueError(f"layers_of: got stacks {sorted(stacks)}, expected one number of layers")
    for site, _ in adapter.sites:
        number = re.search(r"\d+", site.path)
        if not site.stack and not number:
            raise ValueError(f"{site.path}: got no stack and no number, expected a layer; give "
                             "`layers` by hand")  # fmt: skip
        layers[site.path] = tuple(range(site.stack[0])) if site.stack else int(number[0])  # type: ignore[index]
    flat = sorted({n for v in layers.values() for n in (v if isinstance(v, tuple) else (v,))})
    place = {n: k for k, n in enumerate(flat)}
    return {p: tuple(place[n] for n in v) if isinstance(v, tuple) else place[v]
            for p, v in layers.items()}  # fmt: skip


def count(layers: Layers) -> int:
    """How many layers there are.

    Args:
      layers: of all sites.

    Returns:
      L.
    """
    return 1 + max(n for v in layers.values() for n in (v if isinstance(v, tuple) else (v,)))


def weights(alpha: Float[Array, "layers"]) -> Array:
    """w: L times the softmax.

    Args:
      alpha: logits of the layers.

    Returns:
      [L], of mean 1.
    """
    return alpha.shape[0] * jax.nn.softmax(alpha)


def weighted(adapter: Adapter, alpha: Float[Array, "layers"], layers: Layers) -> Adapter:
    """The adapter with the delta of each layer times its weight.

    Args:
      adapter: LoRA, or of any method whose delta is proportional to its frozen `scale`.
      alpha: logits of the layers.
      layers: of each site, as of `layers_of`.

    Returns:
      The adapter with other scales.
    """
    w, frozen = weights(alpha), dict(adapter.frozen)
    for site, _ in adapter.sites:
        own = adapter.frozen[site.path]
        by = w[jnp.asarray(layers[site.path])].astype(own["scale"].dtype)
        frozen[site.path] = {**own, "scale": own["scale"] * by}
    return adapter.replace(frozen=frozen)


def first_order(
    alpha: Float[Array, "layers"], adapter: Adapter, layers: Layers,
    validation: Callable[[Adapter], Float[Array, ""]],
) -> Float[Array, "layers"]:  # fmt: skip
    """The gradient of alpha at the adapter as it is.

    Args:
      alpha: logits of the layers.
      adapter: in training.
      layers: of each site.
      validation: adapter -> L_v, [].

    Returns:
      [L].
    """
    return jax.grad(lambda x: validation(weighted(adapter, x, layers)))(alpha)


def unrolled(
    alpha: Float[Array, "layers"], adapter: Adapter, layers: Layers,
    training: Callable[[Adapter], Float[Array, ""]],
    validation: Callable[[Adapter], Float[Array, ""]], rate: Dynamic,
) -> Float[Array, "layers"]:  # fmt: skip
    """The gradient of alpha through one step of gradient descent on training rows.

    Args:
      alpha: logits of the layers.
      adapter: in training.
      layers: of each site.
      training: adapter -> L_t, [].
      validation: adapter -> L_v, [].
      rate: eta of the inner step; 0 gives `first_order`.

    Returns:
      [L].
    """

    def after(x: Array) -> Array:
        def inner(trainable: Tree) -> Array:
            return training(weighted(adapter.replace(trainable=trainable), x, layers))

        slopes = jax.grad(inner)(adapter.trainable)
        moved = jax.tree.map(
            lambda t, g: t - jnp.asarray(rate, t.dtype) * g, adapter.trainable, slopes
        )
        return validation(weighted(adapter.replace(trainable=moved), x, layers))

    return jax.grad(after)(alpha)


class Search(NamedTuple):
    """State of the search."""

    alpha: Float[Array, "layers"]  # logits
    moments: Tree  # of Adam


def search(layers: Layers, rate: float = 0.01) -> Search:
    """The state at the start.

    Args:
      layers: of each site.
      rate: as of `advance`.

    Returns:
      Logits of zero.
    """
    alpha = jnp.zeros(count(layers), jnp.float32)
    return Search(alpha, optax.adam(rate).init(alpha))


def advance(state: Search, gradient: Float[Array, "layers"], rate: float = 0.01) -> Search:
    """One step of Adam on the logits.

    Args:
      state: of the search.
      gradient: as of `first_order` or `unrolled`.
      rate: learning rate; 0.01 in the official code.

    Returns:
      The new state.
    """
    with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
        updates, moments = optax.adam(rate).update(gradient, state.moments)
    return Search(state.alpha + updates, moments)  # type: ignore[operator]


def select(alpha: Float[Array, "layers"], k: int | None = None) -> Bool[Array, "layers"]:
    """Which layers are trained.

    Args:
      alpha: logits after the search.
      k: how many; None: those of a positive alpha, as the paper has it.

    Returns:
      bool [L]; of equal logits the first ones.

    Raises:
      ValueError: k outside of 1..L.
    """
    if k is None:
        return alpha > 0
    if not 1 <= k <= alpha.shape[0]:
        raise ValueError(f"k: got {k}, expected in 1..{alpha.shape[0]}")
    return jnp.argsort(jnp.argsort(-alpha)) < k


def masks(
    adapter: Adapter, chosen: Bool[Array, "layers"], layers: Layers
) -> dict[str, Bool[Array, "*stack r"]]:
    """Masks that keep every rank of the chosen layers and none of the others.

    Args:
      adapter: for the shapes.
      chosen: as of `select`.
      layers: of each site.

    Returns:
      {path: [*stack, R] bool}; with them `jlora.schedules.ranks.shrink` makes the small adapter,
      and `jlora.schedules.ranks.masked_updates` holds the other layers of a stack still.
    """
    whole = ranks.full(adapter)
    return {p: m & chosen[jnp.asarray(layers[p])][..., None] for p, m in whole.items()}


# The record: sites "down" and "up" are layers 0 and 1; the gradient of w of a site is that of its
# scale, which gradients of b give: <b, dL/db> / w. The better one of two is kept after three steps.
_PLACES, _LENGTH = {"down": 0, "up": 1}, 3


def _observe(state: Tree, adapter: Adapter, gradients: dict) -> Tree:
    search, whole = state  # type: ignore[misc]
    w = weights(search.alpha)
    by = jnp.stack([jnp.sum(adapter.trainable[p]["b"] * gradients[p]["b"]) for p in _PLACES]) / w
    return advance(search, w * (by - jnp.mean(w * by))), whole


def _masks(state: Tree, step: Dynamic) -> dict[str, Array]:
    search, whole = state  # type: ignore[misc]
    chosen = select(search.alpha, 1) | (step < _LENGTH)
    return {p: m & chosen[_PLACES[p]] for p, m in whole.items()}


SYSTEM = Schedule(
    name="Flexora",
    paper="Wei 2024, 2408.10774",
    symbol="unrolled",
    claim="flexora",
    evidence="both gradients by central differences; planted layers are found; w = 1 is LoRA",
    rows=(36,),
    examples=(LoRA(rank=2, alpha=2.0),),
    start=lambda adapter: (search(_PLACES), ranks.full(adapter)),
    observe=_observe,
    masks=_masks,
    mask=ranks.zeroed,
    shrink=ranks.shrink,
    budget=lambda adapter, step: 2 if step >= _LENGTH else 4,
    length=_LENGTH,
)
