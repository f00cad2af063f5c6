r"""Adapters as standardised tokens, and back: what learned generators read and write.

.. math:: x_n = (\mathrm{tokens}(A_n) - m) / s

Tokens are canonical (scale folded in; trained factors in balanced form), one per site slice; m and
s are statistics of the whole bank, the mean adapter and one scale per type of site or per number.
Conditions are centred and get unit mean square, too. Nothing here knows a task: what is right for
a task has to come from its condition.

Original to jlora, as in `jlora.generation.generators.flow`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.core.adapter import Adapter
from jlora.generation.baselines import soup
from jlora.generation.tokens import canonical, normalise, site_tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Standard:
    """The map between adapters of one kind and standardised tokens."""

    norm: normalise.Normaliser  # m and s
    template: Adapter  # frozen parts and sites
    spec: site_tokens.TokenSpec = dataclasses.field(metadata={"static": True})  # layout of tokens


def fit(bank: Adapter, mode: str = "site_rms") -> tuple[Standard, Float[Array, "n T D"]]:
    """Statistics of a bank.

    Args:
      bank: n adapters of LoRA that differ in what is trained alone.
      mode: "site_rms", one scale per type of site, or "coordinate", one per number.

    Returns:
      The map, and the standardised tokens of the bank.

    Raises:
      ValueError: what is frozen differs between adapters, an adapter is not finite, or a mode that
        `normalise.fit` does not know.
    """
    soup.require_shared(bank.frozen)
    template = bank[0]
    spec = site_tokens.from_adapter(template)
    x = jax.vmap(functools.partial(tokens, spec))(bank)
    types = spec.types if mode == "site_rms" else None
    norm = normalise.fit(mode, x, mask=spec.mask, types=types)
    return Standard(norm, template, spec), jax.vmap(functools.partial(normalise.apply, norm))(x)


def tokens(spec: site_tokens.TokenSpec, adapter: Adapter) -> Float[Array, "T D"]:
    """Canonical tokens of one adapter.

    Args:
      spec: their layout.
      adapter: of LoRA; a trained ``a`` is brought to balanced form with its ``b``.

    Returns:
      [T, D]; scale is folded in.
    """
    trained = any("a" in leaves for leaves in adapter.trainable.values())
    kind = "balanced_svd" if trained else "frozen_A"
    return site_tokens.tokenise(
        spec, canonical.canonicalise(kind, adapter.trainable, scales(adapter))
    )


def scales(adapter: Adapter) -> dict[str, Array]:
    """The scale of each site.

    Args:
      adapter: of LoRA.

    Returns:
      path -> [*stack].
    """
    return {path: leaves["scale"] for path, leaves in adapter.frozen.items()}


def adapter(state: Standard, x: Float[Array, "T D"]) -> Adapter:
    """The adapter of standardised tokens.

    Args:
      state: of `fit`.
      x: its tokens; what stands in their padding is not read.

    Returns:
      An adapter like those of the bank.
    """
    raw = site_tokens.detokenise(state.spec, normalise.invert(state.norm, x))
    trainable = canonical.unfold(raw, scales(state.template))
    return state.template.replace(trainable=jax.tree.map(jnp.asarray, trainable))


def loss_weights(state: Standard) -> Float[Array, "T D"]:
    """Weights of a mean over the numbers of an adapter that leaves padding out.

    Args:
      state: of `fit`.

    Returns:
      [T, D], of sum 1.
    """
    mask = jnp.asarray(state.spec.mask, jnp.float32)
    return mask / jnp.sum(mask)


def centre(conditions: Float[Array, "n E"]) -> tuple[Float[Array, "E"], Float[Array, ""]]:
    """Statistics that bring conditions to mean zero and unit mean square.

    Args:
      conditions: of the adapters that are learned from.

    Returns:
      Their mean, and the root mean square of the numbers of what differs from it.

    Raises:
      ValueError: conditions that are not finite, or all alike.
    """
    if not np.isfinite(np.asarray(conditions)).all():
        raise ValueError("conditions: got numbers that are not finite")
    mean = jnp.mean(conditions, axis=0)
    size = jnp.sqrt(jnp.mean((conditions - mean[None]) ** 2))
    if not float(size) > 1e-6 * float(jnp.sqrt(jnp.mean(mean**2))):
        raise ValueError("all conditions are equal: there is nothing to generate by")
    return mean, size
