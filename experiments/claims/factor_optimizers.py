"""What the claims of optimizers share: LoRA of rank 4 at scale 1, trained by another optimizer."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

import jlora as jl
from experiments.claims import text_methods as lib
from jlora.types import Dynamic, Tree

RANK = 4


def with_unit_scale(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation for adapters of scale 1, which the harness does not pass on.

    Args:
      rule: of `jlora.optimizers`, whose `update` takes ``frozen``.

    Returns:
      The same without that argument.
    """
    rule = optax.with_extra_args_support(rule)

    def update(updates: Tree, state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
        frozen = {
            path: {"scale": jnp.ones(site["b"].shape[:-2])}
            for path, site in params.items()  # type: ignore[union-attr]
        }
        return rule.update(updates, state, params, frozen=frozen)

    return optax.GradientTransformation(rule.init, update)


def lora_by(
    name: str, solver: Callable[[Dynamic], optax.GradientTransformation], rate: float
) -> lib.Recipe:
    """The recipe of LoRA under an optimizer.

    Args:
      name: of the recipe in the record.
      solver: learning-rate schedule -> transformation.
      rate: the middle of the first three learning rates.

    Returns:
      It, on the four attention kernels.
    """
    return lib.on_attention(name, jl.LoRA(rank=RANK, alpha=float(RANK)), rate, solver=solver)
