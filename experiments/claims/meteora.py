"""MeteoRA: gates over the adapters of all tasks, without the task's name."""

from experiments.claims import routed_text as lib
from jlora.methods import MeteoRA

CLAIM = lib.claim(
    name="meteora",
    systems=("MeteoRA",),
    recipe=lib.Recipe("MeteoRA", MeteoRA(8, 2, 4), 5e-3, labels=1.0, zoo=True),
    baseline="single",
    reference="Xu 2024, 2405.13053: one model with all adapters comes near each on its own task",
    others=(lib.lora(4),),
)
