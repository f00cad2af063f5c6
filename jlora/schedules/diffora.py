r"""DiffoRA: a matrix of weights says which modules get LoRA; it is learned, then made binary.

==========  =================================================================================
n           modules: every adapted weight of every layer is one
gamma       [n], logits, zero at the start
Gamma       [n], the differential adaptation matrix, flat: one weight of a module's delta
theta       what LoRA trains, one set of factors for all choices of modules (weight sharing)
L_t, L_v    loss on training rows, and on validation rows
k           how many modules are kept
==========  =================================================================================

.. math::
    W_i' = W_i + \Gamma_i \, s A_i B_i, \qquad
    \Gamma = \sigma(\gamma) \;\;\text{(sigmoid)} \quad\text{or}\quad
    \Gamma = n\,\mathrm{softmax}(\gamma) \;\;\text{(softmax)}

    \theta \leftarrow \theta - \eta \nabla_\theta L_t(\theta, \Gamma), \qquad
    \gamma \leftarrow \mathrm{Adam}(\nabla_\gamma L_v)

    \bar\Gamma_i = 1 \text{ of the } k \text{ largest } \gamma_i, \text{ else } 0

The gradient of gamma is of first order, or unrolled through one step of theta. Afterwards the kept
modules are plain LoRA: they go on from theta, which the search has trained, or start afresh.

Reference: Jiang et al. 2025, arXiv:2502.08905; the abstract only, so the form above is our own
choice: a continuous relaxation, weight sharing and discretisation are all that it names.
Deviates: what is open is an argument: the relaxation, the order of the gradient, k, and whether
kept modules go on from shared weights. The paper's theory (least eigenvalue of a Gram matrix) takes
no part in the choice.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.contracts.schedule import Schedule
from jlora.core.adapter import Adapter
from jlora.methods.low_rank.lora import LoRA
from jlora.schedules import flexora, ranks
from jlora.schedules.flexora import Layers, Search
from jlora.types import Dynamic, Tree

Relaxation = Literal["sigmoid", "softmax"]


def modules(adapter: Adapter) -> dict[str, tuple[int, ...] | int]:
    """Numbers of the modules.

    Args:
      adapter: of any methods.

    Returns:
      path -> the numbers of the slices of a stack, or one number; in the order of the sites.

    Raises:
      ValueError: a stack of several axes.
    """
    out, at = {}, 0
    for site, _ in adapter.sites:
        if len(site.stack) > 1:
            raise ValueError(f"{site.path}: got the stack {site.stack}, expected at most one axis")
        size = site.stack[0] if site.stack else 1
        out[site.path] = tuple(range(at, at + size)) if site.stack else at
        at += size
    return out


def matrix(gamma: Float[Array, "n"], relaxation: Relaxation = "sigmoid") -> Float[Array, "n"]:
    """Gamma, the relaxed matrix.

    Args:
      gamma: logits of the modules.
      relaxation: "sigmoid" weighs every module on its own in (0, 1), and is the default because
        Gamma is then a relaxed binary matrix; "softmax" lets modules compete, with a mean of 1.

    Returns:
      [n].

    Raises:
      ValueError: another relaxation.
    """
    if relaxation == "sigmoid":
        return jax.nn.sigmoid(gamma)
    if relaxation == "softmax":
        return gamma.shape[0] * jax.nn.softmax(gamma)
    raise ValueError(f"relaxation: got {relaxation!r}, expected 'sigmoid' or 'softmax'")


def weighted(adapter: Adapter, weights: Float[Array, "n"], places: Layers) -> Adapter:
    """The adapter with the delta of each module times its weight.

    Args:
      adapter: LoRA, or of any method whose delta is proportional to its frozen `scale`.
      weights: Gamma, relaxed or binary.
      places: as of `modules`.

    Returns:
      The adapter with other scales.
    """
    frozen = dict(adapter.frozen)
    for site, _ in adapter.sites:
        own = adapter.frozen[site.path]
        by = weights[jnp.asarray(places[site.path])].astype(own["scale"].dtype)
        frozen[site.path] = {**own, "scale": own["scale"] * by}
    return adapter.replace(frozen=frozen)


def slope(
    gamma: Float[Array, "n"], adapter: Adapter, places: Layers,
    validation: Callable[[Adapter], Float[Array, ""]],
    training: Callable[[Adapter], Float[Array, ""]] | None = None, rate: Dynamic = 0.0,
    relaxation: Relaxation = "sigmoid",
) -> Float[Array, "n"]:  # fmt: skip
    """The gradient of gamma on validation rows.

    Args:
      gamma: logits of the modules.
      adapter: in training.
      places: as of `modules`.
      validation: adapter -> L_v, [].
      training: adapter -> L_t, []; None: first order, which costs one backward pass.
      rate: eta of the inner step that is unrolled; not read without `training`.
      relaxation: as of `matrix`.

    Returns:
      [n].
    """

    def stepped(trainable: Tree, weights: Array) -> Tree:
        """theta after the inner step."""
        if training is None:
            return trainable
        seen = training

        def of_theta(t: Tree) -> Array:
            return seen(weighted(adapter.replace(trainable=t), weights, places))

        slopes = jax.grad(of_theta)(trainable)
        return jax.tree.map(lambda t, g: t - jnp.asarray(rate, t.dtype) * g, trainable, slopes)

    def after(x: Array) -> Array:
        weights = matrix(x, relaxation)
        moved = adapter.replace(trainable=stepped(adapter.trainable, weights))
        return validation(weighted(moved, weights, places))

    return jax.grad(after)(gamma)


def discretised(
    adapter: Adapter, gamma: Float[Array, "n"], k: int, places: Layers, fresh: Adapter | None = None
) -> Adapter:
    """Plain LoRA on the modules of the k largest logits.

    Args:
      adapter: after the search, of the scales that it began with.
      gamma: logits after the search; numbers, not traced.
      k: how many modules are kept, in 1..n.
      places: as of `modules`.
      fresh: an untrained adapter of the same sites, whose factors the kept modules get instead of
        the shared ones; None: they go on from those of the search.

    Returns:
      A smaller adapter; sites without a kept module are gone. Of a stack in which some layers are
      kept, the others have zero factors: hold them still with
      `jlora.schedules.ranks.masked_updates`.

    Raises:
      ValueError: k outside of 1..n.
    """
    chosen = flexora.select(gamma, k)
    masks = flexora.masks(adapter, chosen, places)
    return ranks.shrink(fresh or adapter, (), masks)[0]


# The record: modules "down" and "up"; the gradient of Gamma of a module is that of its scale, which
# gradients of b give: <b, dL/db> / Gamma. The better one is kept after three steps.
_PLACES, _LENGTH = {"down": 0, "up": 1}, 3


def _observe(state: Tree, adapter: Adapter, gradients: dict) -> Tree:
    search, whole = state  # type: ignore[misc]
    now, back = jax.vjp(matrix, search.alpha)
    by = jnp.stack([jnp.sum(adapter.trainable[p]["b"] * gradients[p]["b"]) for p in _PLACES]) / now
    return flexora.advance(search, back(by)[0]), whole


def _masks(state: Tree, step: Dynamic) -> dict[str, Array]:
    search, whole = state  # type: ignore[misc]
    chosen = flexora.select(search.alpha, 1) | (step < _LENGTH)
    return {p: m & chosen[_PLACES[p]] for p, m in whole.items()}


def begin(places: Layers, rate: float = 0.01) -> Search:
    """The state of the search at the start; `jlora.schedules.flexora.advance` moves it.

    Args:
      places: as of `modules`.
      rate: learning rate of Adam; 0.01 as for Flexora, the paper's is not known.

    Returns:
      Logits of zero, in the field `alpha`.

    Raises:
      ValueError: numbers that are not 0 to n - 1.
    """
    flat = sorted(np.concatenate([np.atleast_1d(v) for v in places.values()]).tolist())
    if flat != list(range(len(flat))):
        raise ValueError(f"places: got {flat}, expected 0 to {len(flat) - 1}")
    return flexora.search(places, rate)


SYSTEM = Schedule(
    name="DiffoRA",
    paper="Jiang 2025, 2502.08905",
    symbol="slope",
    claim="diffora",
    evidence="gradients by central differences for both relaxations; a planted module is kept",
    rows=(37,),
    examples=(LoRA(rank=2, alpha=2.0),),
    start=lambda adapter: (begin(_PLACES), ranks.full(adapter)),
    observe=_observe,
    masks=_masks,
    mask=ranks.zeroed,
    shrink=ranks.shrink,
    budget=lambda adapter, step: 2 if step >= _LENGTH else 4,
    length=_LENGTH,
)
