"""MoLA: more experts in the upper layer than in the lower one, at equal total."""

from experiments.claims import routed_text as lib
from jlora.methods import Experts

EVEN = lib.Recipe("3 and 3 experts", Experts(3, 2, 4, alpha=4.0), 8e-3, 1e-3)
FALLING = lib.Recipe("4 and 2 experts", Experts(4, 2, 4, alpha=4.0, counts=(4, 2)), 8e-3, 1e-3)
CLAIM = lib.claim(
    name="mola",
    systems=("Experts",),
    recipe=lib.Recipe("2 and 4 experts", Experts(4, 2, 4, alpha=4.0, counts=(2, 4)), 8e-3, 1e-3),
    baseline=EVEN,
    reference="Gao 2024, 2402.08562: the inverted triangle is better than the rectangle",
    parameters="at equal number of experts",
    others=(FALLING,),
)
