r"""Optimizers of adapters: optax transformations that see the two factors of a site together.

=========  =====================================================================================
A, B       `a` [*stack, d_in, r] and `b` [*stack, r, d_out] of one site, trained
s          its `scale`, frozen
g, u       gradients and updates, trees like `Adapter.trainable`
D          the delta of a site, :math:`s A B`
=========  =====================================================================================

A system gives ``make() -> optax.GradientTransformation``, a whole optimizer with its learning rate
in. Its `update` is called as ``update(g, state, trainable, frozen=frozen)``: the scale arrives as
an extra argument of optax, which transformations that do not ask for it never see. One that claims
to be independent of the gauge moves D alike from every pair of factors of one delta,

.. math:: (A, B) \to (A G, G^{-1} B) \quad\Rightarrow\quad D_{t+1} \text{ is the same.}

Laws, each an error relative to the updates (to the change of D for `gauge`), 0 where it holds:

==========  ================================================================================
restore     the state is a PyTree of arrays, of a form that stays, which Orbax restores bitwise
masked      arrays that are not trained get updates of exactly zero and no state (`only`), and
            the others what they get without them
zero        a gradient of zero gives an update of zero: no weight decay
dtype       updates have the dtypes of the parameters, float32 and bfloat16, and are finite
jit         jitted is eager
names       sites of other names, so in another order, get the same updates
gauge       the change of D does not depend on the gauge (systems that claim it)
stack       a site with a leading axis of layers gets what every layer gets alone
bank        `jax.vmap` over a bank of adapters is a loop over them
==========  ================================================================================
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import ClassVar

import jax
import optax

from jlora.core.site import Arrays
from jlora.system import System
from jlora.types import Tree

LAWS = ("restore", "masked", "zero", "dtype", "jit", "names", "gauge", "stack", "bank")
Trainable = dict[str, Arrays]  # path of a site -> name -> array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer(System):
    """The record of an optimizer.

    Attributes:
      make: () -> an optax transformation, as it is used: with a learning rate, no weight decay.
      gauge: whether the change of D is claimed not to depend on how D is split into factors.
    """

    laws: ClassVar[tuple[str, ...]] = LAWS
    suite: ClassVar[tuple[str, ...]] = ("tests/contracts/optimizer_test.py",)

    make: Callable[[], optax.GradientTransformation]
    gauge: bool = False


def only(
    transformation: optax.GradientTransformation, paths: Collection[str]
) -> optax.GradientTransformationExtraArgs:
    """The transformation for the sites of `paths`; the others get updates of zero and no state.

    (`optax.masked` alone would pass their gradients on as updates.)

    Args:
      transformation: of trees like `Adapter.trainable`.
      paths: of the sites that are trained.

    Returns:
      A transformation of the whole tree.
    """

    def labels(tree: Tree) -> Tree:
        named = {path: "trained" if path in paths else "frozen" for path in tree}
        return {path: jax.tree.map(lambda _, p=path: named[p], tree[path]) for path in tree}

    return optax.partition({"trained": transformation, "frozen": optax.set_to_zero()}, labels)
