"""LoRA+: a larger learning rate for B than for A.

=======  ==============================================================
A, B     factors of a delta A B, [d_in, r] and [r, d_out]
u        the updates of the optimizer before it, its learning rate in
lambda   `ratio`
=======  ==============================================================

.. math:: A \\leftarrow A + u_A, \\qquad B \\leftarrow B + \\lambda \\, u_B

B starts at zero and its gradient is of the size of A x, which the width makes small; with one rate
for both, the one that suits A leaves B behind. To be chained after an optimizer, weight decay
included: ``optax.chain(optax.adamw(1e-4), lora_plus(16.0))`` on `adapter.trainable`.

Paper: Hayou et al. 2024, arXiv:2402.12354.
Source: paper (lambda = 16 is its default).
Deviates: the rates of embedding tables are not set apart, as the official code does.
"""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax

from jlora.contracts.optimizer import Optimizer
from jlora.types import Dynamic, Tree


def lora_plus(ratio: float = 16.0, names: Collection[str] = ("b",)) -> optax.GradientTransformation:
    """Multiplies the updates of arrays that are called one of `names` by `ratio`.

    Args:
      ratio: lambda, positive.
      names: what B is called: "b" in LoRA, DoRA, HiRA and AdaLoRA, "b1" and "b2" in LoHa.

    Returns:
      A stateless transformation of trees like `Adapter.trainable`, or of one that contains it.

    Raises:
      ValueError: a ratio that is not positive; at `init`, where no array has such a name.
    """
    if not ratio > 0:
        raise ValueError(f"ratio: got {ratio}, expected a positive number")

    def name(path: Dynamic) -> str:
        return str(getattr(path[-1], "key", path[-1])) if path else ""

    def init(params: Tree) -> optax.EmptyState:
        leaf_names = {name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
        if not leaf_names & set(names):
            raise ValueError(f"names: got {sorted(names)}, expected some of {sorted(leaf_names)}")
        return optax.EmptyState()

    def update(updates: Tree, state: Tree, params: Tree = None) -> tuple[Dynamic, Dynamic]:
        del params

        def scaled(path, u):
            return u * jnp.asarray(ratio, u.dtype) if name(path) in names else u

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(init, update)


SYSTEM = Optimizer(
    name="LoRA+",
    paper="Hayou 2024, 2402.12354",
    symbol="lora_plus",
    evidence="one step by numpy; two learning rates of optax; half the steps of one rate",
    claim="lora_plus",
    make=lambda: optax.chain(optax.adam(0.01), lora_plus(16.0)),
)
