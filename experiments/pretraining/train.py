r"""One step of next-token training by AdamW, and the rows that a step reads.

.. math::
    L = -\frac{1}{BT} \sum_{b,t} \log p(i_{b,t+1} \mid i_{b,\le t})

Symbols: B rows of T + 1 tokens, each a window of the stream at a random place (so a row may hold
the end of a document and the start of the next).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax import Array

from experiments.finetuning.step import Report
from experiments.pretraining.settings import Settings
from jlora.models import decoder


class State(NamedTuple):
    """All that changes during a run."""

    step: Any  # int32 []: steps done
    params: Any  # of the decoder
    optimizer: Any  # its state


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """Muon or AdamW with warm-up and cosine; norms do not decay.

    Args:
      settings: of the run.
    """
    warmup = max(1, round(settings.warmup * settings.steps))

    def rate(peak: float) -> optax.Schedule:
        end = max(settings.steps, warmup + 1)
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, end, peak * 0.05)

    def decays(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "scale" not in jax.tree_util.keystr(path), params
        )

    if settings.optimizer == "adamw":
        rule = optax.adamw(
            rate(settings.lr), b2=0.95, weight_decay=settings.weight_decay, mask=decays
        )
    else:
        rule = optax.contrib.muon(
            rate(settings.muon_lr), weight_decay=settings.weight_decay, adam_b2=0.95,
            adam_learning_rate=rate(settings.lr), muon_weight_dimension_numbers=_matrices,
        )  # fmt: skip
    return optax.chain(optax.clip_by_global_norm(settings.clip), rule)


def _matrices(params: Any) -> Any:
    """Kernels are stacked (axis 0 is the layer, then in, out); None: AdamW."""
    kernel = optax.contrib.MuonDimensionNumbers(1, 2)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: kernel if "kernel" in jax.tree_util.keystr(path) else None, params
    )


def initial(settings: Settings) -> State:
    """The state before the first step.

    Args:
      settings: of the run.
    """
    params = decoder.init(jax.random.key(settings.seed), settings.config())
    return State(jnp.int32(0), params, optimizer(settings).init(params))


def rows(stream: np.ndarray, settings: Settings, step: int) -> np.ndarray:
    """The rows of a step, int32 [batch, context + 1]; they follow from seed and step alone.

    Args:
      stream: tokens of the training documents.
      settings: of the run.
      step: its number.
    """
    random = np.random.default_rng([settings.seed, step])
    starts = random.integers(0, len(stream) - settings.context, settings.batch)
    return stream[starts[:, None] + np.arange(settings.context + 1)[None]].astype(np.int32)


def losses(params: Any, ids: Array, config: decoder.DecoderConfig) -> Array:
    """Cross-entropy in nats of every token but the first of each row, float32 [b, t].

    Args:
      params: of the decoder.
      ids: [b, t + 1].
      config: the architecture.
    """
    logits = decoder.forward(params, ids[:, :-1], config=config).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])


def make(settings: Settings) -> Callable[[State, Array], tuple[State, Report]]:
    """The jitted step ``(state, ids) -> (state, report)``; the state's buffers are donated.

    Args:
      settings: of the run.
    """
    rule, config = optimizer(settings), settings.config()

    def step(state: State, ids: Array) -> tuple[State, Report]:
        mean = lambda params: jnp.mean(losses(params, ids, config))  # noqa: E731
        value, grads = jax.value_and_grad(mean)(state.params)
        norm = optax.tree.norm(grads)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, inner = rule.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        report = Report(value, norm, jnp.isfinite(value) & jnp.isfinite(norm))
        return State(state.step + 1, params, inner), report

    return jax.jit(step, donate_argnums=0)
