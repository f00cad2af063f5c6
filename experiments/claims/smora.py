"""SMoRA: eight ranks of 64 per token are as good as all of them, on tasks that are mixed."""

from experiments.claims import routed_text as lib
from jlora.methods import Experts, SMoRA

EXPERTS = lib.Recipe("8 experts of rank 8, one per token", Experts(8, 1, 8, alpha=8.0), 8e-3, 0.01)
CLAIM = lib.claim(
    name="smora",
    systems=("SMoRA",),
    recipe=lib.Recipe("SMoRA, 8 of 64 ranks", SMoRA(64, 8, alpha=8.0, rate=1e-3), 8e-3),
    baseline=lib.lora(64),
    reference="Zhao 2025, 2501.15103: better than LoRA of the same rank, at 8 of 64 active",
    parameters="with 1/8 of the ranks active per token",
    others=(EXPERTS,),
)
