r"""LISA: full parameters of a few layers, drawn anew every K steps; moments of those layers alone.

==========  ==============================================================================
L, n        layers of a stack, and slots: how many are trained at a time
K           `interval`, steps between two draws
i_1..i_n    the layers in the slots, drawn without replacement
m, v        first and second moments: [n, ...] of a stacked array, whole of the others
t           steps since the draw, from 1; of arrays outside of the stack, steps at all
==========  ==============================================================================

.. math:: \theta_{i_j} \leftarrow \theta_{i_j} - \eta \Big( \frac{\hat m_j}{\sqrt{\hat v_j} +
          \epsilon} + \lambda \, \theta_{i_j} \Big), \qquad
          \theta_l \text{ stays for } l \notin \{i_1, ..., i_n\}

Embeddings, head and all else outside of the stack are trained in every step by the same AdamW. At a
draw the moments of the slots begin anew, so that the state holds n layers, not L. Layers outside of
the slots stay bitwise what they are, whatever the weight decay.

``lisa(1e-5, layers="^layers/")`` is a whole optimizer of the parameters themselves. What must not
be trained at all is left out by `optax.partition`.

Paper: Pan et al. 2024, arXiv:2403.17919.
Source: paper and official code, whose newest form drops the moments at a draw.
Deviates: gradients of all layers are computed and those that are not needed are dropped, so the
state is small, but not the gradients; `probabilities` are those of the draw, uniform as in the code
unless given.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Int32

from jlora.contracts.optimizer import Optimizer
from jlora.core.site import at_least_float32
from jlora.types import Dynamic, Tree


class LisaState(NamedTuple):
    """State of `lisa`."""

    step: Int32[Array, ""]  # steps done
    key: Array  # uint32, of the draws
    index: Int32[Array, "n"]  # layers in the slots
    mu: Tree  # first moments: stacked arrays have n layers
    nu: Tree  # second moments


def lisa(
    rate: float | Callable[[Dynamic], Dynamic], layers: str, *, slots: int = 2, interval: int = 20,
    seed: int = 0, probabilities: Sequence[float] | None = None, b1: float = 0.9,
    b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0,
) -> optax.GradientTransformation:  # fmt: skip
    """AdamW on n layers of a stack at a time, and on all that is outside of it.

    Args:
      rate: learning rate, or the step, from 0, -> it.
      layers: regular expression that finds (`re.search`) the paths, joined by "/", of the arrays
        with a leading axis of L layers.
      slots: n.
      interval: K.
      seed: of the draws.
      probabilities: weights of the layers in the draw; None: all alike.
      b1: decay of the first moments.
      b2: decay of the second moments.
      eps: added to the root of the second moments.
      weight_decay: lambda.

    Returns:
      A transformation of any tree of parameters; `update` needs them.

    Raises:
      ValueError: slots or interval < 1; at `init`, no array that is found, stacks of different
        lengths, more slots than layers, or other than L probabilities; at `update`, no parameters.
    """
    if slots < 1 or interval < 1:
        raise ValueError(f"lisa: got slots {slots}, interval {interval}, expected at least 1")
    stacked = re.compile(layers)

    def init(params: Tree) -> LisaState:
        flags = _flags(params, stacked)
        sizes = {p.shape[0] for p, is_layer in flags if is_layer}
        if len(sizes) != 1:
            raise ValueError(f"layers: got {layers!r}, which finds stacks of {sorted(sizes)} "
                             "layers, expected one number")  # fmt: skip
        (count,) = sizes
        if slots > count:
            raise ValueError(f"slots: got {slots}, expected at most {count}, the layers")
        if probabilities is not None and len(probabilities) != count:
            raise ValueError(f"probabilities: got {len(probabilities)}, expected {count}")
        zero = _map(lambda p, is_layer: jnp.zeros_like(p[:slots] if is_layer else p), params,
                    pattern=stacked)  # fmt: skip
        key = jax.random.key_data(jax.random.key(seed))
        return LisaState(jnp.zeros((), jnp.int32), key, jnp.zeros(slots, jnp.int32), zero, zero)

    def update(updates: Tree, state: LisaState, params: Tree = None) -> tuple[Tree, LisaState]:
        if params is None:
            raise ValueError("lisa: got no params, expected those that are updated")
        count = next(p.shape[0] for p, is_layer in _flags(params, stacked) if is_layer)
        fresh = state.step % interval == 0
        drawn = draw(state.key, state.step // interval, count, slots, probabilities)
        index = jnp.where(fresh, drawn, state.index)
        ages = state.step + 1, state.step % interval + 1  # of the whole, of a slot
        eta = rate(state.step) if callable(rate) else rate

        def moment(decay: float, power: int) -> Callable[..., Array]:
            def one(old: Array, g: Array, is_layer: bool) -> Array:
                g = g[index] if is_layer else g
                old = jnp.where(fresh, jnp.zeros_like(old), old) if is_layer else old
                return (decay * old + (1 - decay) * g**power).astype(old.dtype)

            return one

        mu = _map(moment(b1, 1), state.mu, updates, pattern=stacked)
        nu = _map(moment(b2, 2), state.nu, updates, pattern=stacked)

        def moved(p: Array, m: Array, v: Array, is_layer: bool) -> Array:
            form, age = at_least_float32(p.dtype), ages[is_layer].astype(jnp.float32)
            own = (p[index] if is_layer else p).astype(form)
            first = m.astype(form) / (1 - b1**age).astype(form)
            second = v.astype(form) / (1 - b2**age).astype(form)
            change = first / (jnp.sqrt(second) + eps) + weight_decay * own
            change = (-jnp.asarray(eta, form) * change).astype(p.dtype)
            return jnp.zeros_like(p).at[index].set(change) if is_layer else change

        results = _map(moved, params, mu, nu, pattern=stacked)
        return results, LisaState(state.step + 1, state.key, index, mu, nu)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def draw(
    key: Int[Array, "words"], number: Dynamic, count: int, slots: int,
    probabilities: Sequence[float] | None = None,
) -> Int32[Array, "slots"]:  # fmt: skip
    """The layers of one window.

    Args:
      key: uint32, `jax.random.key_data`.
      number: of the window; may be traced.
      count: L.
      slots: n.
      probabilities: weights of the layers; None: all alike.

    Returns:
      n different numbers of 0..L-1.
    """
    one = jax.random.fold_in(jax.random.wrap_key_data(key), number)
    weights = None
    if probabilities is not None:
        weights = jnp.asarray(probabilities, jnp.float32) / sum(probabilities)
    return jax.random.choice(one, count, (slots,), replace=False, p=weights).astype(jnp.int32)


def layer_norms(change: Tree, layers: str) -> Array:
    """How far each layer is moved: what shows that LoRA trains some layers far more than others.

    Args:
      change: a tree like the parameters: new ones minus old ones.
      layers: as of `lisa`.

    Returns:
      [L], Frobenius norms over all stacked arrays.
    """
    square = [jnp.sum(t.reshape(t.shape[0], -1) ** 2, axis=1)
              for t, is_layer in _flags(change, re.compile(layers)) if is_layer]  # fmt: skip
    return jnp.sqrt(sum(square[1:], square[0]))


def _path(path: Dynamic) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)


def _flags(tree: Tree, pattern: re.Pattern[str]) -> list[tuple[Array, bool]]:
    """Every array, and whether it is stacked."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(leaf, bool(pattern.search(_path(path)))) for path, leaf in leaves]


def _map(f: Callable[..., Array], tree: Tree, *more: Tree, pattern: re.Pattern[str]) -> Tree:
    """`jax.tree.map` of f(leaf, ..., whether it is stacked)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *t: f(*t, bool(pattern.search(_path(path)))), tree, *more
    )


SYSTEM = Optimizer(
    name="LISA",
    paper="Pan 2024, 2403.17919",
    symbol="lisa",
    claim="lisa",
    evidence="optax's AdamW on the drawn layers; others bitwise still; draws are even",
    rows=(29,),
    more_claims=("lisa_decoder",),
    make=lambda: lisa(0.05, layers="a$", slots=1, interval=2),
    breaks={"stack": "the first axis is that of the layers, of which some are drawn"},
)
