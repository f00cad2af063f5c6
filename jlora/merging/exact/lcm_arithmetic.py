"""LCM-LoRA's arithmetic: what makes a model fast is a vector, added to what gives it a style.

==========  ==================================================================
tau         acceleration vector, theta of the distilled model - theta of the base, as an adapter
tau'        style vector, an adapter trained without distillation
l1, l2      their strengths
==========  ==================================================================

.. math:: \\theta' = \\theta + \\lambda_1 \\tau' + \\lambda_2 \\tau, \\qquad
          \\lambda_1 = 0.8, \\; \\lambda_2 = 1

No training: the sum is exact, at any ranks and of different sites. tau itself comes from
consistency distillation, `jlora.generation.diffusion.consistency`.

Paper: Luo et al. 2023, arXiv:2311.05556.
Source: paper; its default strengths are those of figure 3.
Deviates: nothing.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from jlora.core.adapter import Adapter
from jlora.merging.engine.inputs import gather, per_site, to_adapter
from jlora.merging.exact.concat import concat
from jlora.system import System


def lcm_arithmetic(
    styles: Adapter | Sequence[Adapter],
    acceleration: Adapter,
    *,
    style: float | Sequence[float] = 0.8,
    strength: float = 1.0,
) -> Adapter:
    """The sum of one style, or of several, and an acceleration vector.

    Adapters may have different sites; one without a site adds nothing there.

    Args:
      styles: one adapter, or a list of them.
      acceleration: the adapter that makes the model fast.
      style: l1, one strength or one for each style; 0.8, as in the paper.
      strength: l2, of the acceleration; 1, as in the paper.

    Returns:
      A LoRA adapter of the summed ranks.

    Raises:
      ValueError: another number of strengths than styles, and as `gather` does.
    """
    many = [styles] if isinstance(styles, Adapter) else list(styles)
    strengths = [style] * len(many) if isinstance(style, int | float) else list(style)
    if len(strengths) != len(many):
        raise ValueError(
            f"style: got {len(strengths)}, expected one for each of {len(many)} styles"
        )
    weights = jnp.asarray([*strengths, strength], jnp.float32)
    bank, weights, sites = gather([*many, acceleration], weights, missing="zero")
    return to_adapter(per_site(concat)(bank, weights), sites)


SYSTEM = System(
    name="LCM-LoRA arithmetic",
    paper="Luo 2023, 2311.05556",
    symbol="lcm_arithmetic",
    evidence="dense sum; fewer steps of a styled linear flow; mutation check",
    kind="composition",
    rows=(51,),
    claim="lcm_lora",
)
