"""A schedule, clipping, an optimizer by its name and LoRA+ as one optax transformation."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import optax

from experiments.config import wrong
from experiments.finetuning.settings import OPTIMIZERS, Settings
from jlora import optimizers
from jlora.optimizers.lora_plus import lora_plus

MOMENTS = ("riemannian", "lora_fa")  # precondition gradients of which AdamW then keeps moments


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


def optimizer(settings: Settings, steps: int) -> optax.GradientTransformationExtraArgs:
    """The optimizer of `Adapter.trainable`; its `update` takes ``frozen=adapter.frozen``.

    Args:
      settings: of the run.
      steps: of the whole run.

    Raises:
      ValueError: `optimizer_args` that are no JSON object, or that the optimizer lacks or refuses.
    """
    name, rate = settings.optimizer, schedule(settings, steps)
    rule = _rule(settings)
    chain: list[optax.GradientTransformation] = []
    if settings.clip:
        chain.append(optax.clip_by_global_norm(settings.clip))
    if name == "adamw":
        chain.append(rule(rate, weight_decay=settings.weight_decay))
    else:
        chain.append(rule())
        if name in MOMENTS:
            chain.append(optax.adamw(rate, weight_decay=settings.weight_decay))
        else:
            chain += [optax.add_decayed_weights(settings.weight_decay)]
            chain += [optax.scale_by_learning_rate(rate)]
    if settings.lora_plus != 1:
        chain.append(lora_plus(settings.lora_plus))
    return optax.with_extra_args_support(optax.chain(*chain))


def _rule(settings: Settings) -> Callable[..., optax.GradientTransformation]:
    """The optimizer that the settings name, with its hyper-parameters, whose names are checked."""
    name, text = settings.optimizer, settings.optimizer_args
    if name not in OPTIMIZERS:
        raise wrong("optimizer", name, f"one of {', '.join(OPTIMIZERS)}")
    kind: Any = optax.adamw if name == "adamw" else getattr(optimizers, name)
    mine = {"learning_rate", "weight_decay", "mask", "mu_dtype"}  # other settings, or no JSON
    fields = sorted(inspect.signature(kind).parameters.keys() - mine)
    try:
        more = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise wrong("optimizer_args", text, f"JSON ({error})") from error
    if not isinstance(more, dict) or not more.keys() <= set(fields):
        raise wrong("optimizer_args", text, f"a JSON object of {fields}")

    def rule(*args: Any, **given: Any) -> optax.GradientTransformation:
        try:
            return kind(*args, **given, **more)
        except (TypeError, ValueError) as error:
            raise ValueError(f"optimizer_args: {name}: {error}") from error

    return rule
