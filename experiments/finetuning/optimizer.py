"""AdamW with a schedule, clipping and LoRA+ as one optax transformation."""

from __future__ import annotations

import optax

from experiments.finetuning.settings import Settings
from jlora.optimizers.lora_plus import lora_plus


def schedule(settings: Settings, steps: int) -> optax.Schedule:
    """Learning rate by step: linear from 0 to its peak, then as `schedule` says, down to 0.

    Args:
      settings: of the run.
      steps: of the whole run.
    """
    up = min(round(settings.warmup * steps), steps - 1)
    rest = steps - up
    after = {
        "cosine": optax.cosine_decay_schedule(settings.lr, rest),
        "linear": optax.linear_schedule(settings.lr, 0.0, rest),
        "constant": optax.constant_schedule(settings.lr),
    }[settings.schedule]
    if not up:
        return after
    rise = optax.linear_schedule(settings.lr / up, settings.lr, up - 1 or 1)
    return optax.join_schedules([rise, after], [up])


def optimizer(settings: Settings, steps: int) -> optax.GradientTransformation:
    """The optimizer of `Adapter.trainable`.

    Args:
      settings: of the run.
      steps: of the whole run.
    """
    chain: list[optax.GradientTransformation] = []
    if settings.clip:
        chain.append(optax.clip_by_global_norm(settings.clip))
    chain.append(optax.adamw(schedule(settings, steps), weight_decay=settings.weight_decay))
    if settings.lora_plus != 1:
        chain.append(lora_plus(settings.lora_plus))
    return optax.chain(*chain)
