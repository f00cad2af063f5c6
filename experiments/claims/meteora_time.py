r"""MeteoRA: a decoding step through many adapters, by gathered experts against a loop over them.

==========  ======================================================================================
E           28 adapters of rank 8 at every kernel of the six layers of base L, 2 of them per token
step        the next token of 8 rows of held-out text; base L has read the first tokens of them
x_si        log of the seconds of round i with the back-end "gather": of each token its own experts
y_si        the same with a loop over the experts, each on all tokens, its weight zero for most
z_si        control: the back-end "gather" that is asked for all 28 adapters of each token
==========  ======================================================================================

.. math:: x_{si} < y_{si} - \log 3

All three are one compiled program for the whole model, which has the same gates and adapters; that
the first and the second give the same logits is checked before anything is timed. A round times all
of them, several steps each, in an order drawn anew. Rows of whole sequences are timed too, with the
back-end "dense". Adapters are random: the time does not depend on their values.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.claims.protocol import Claim, Figures
from experiments.pretraining import base_l, texts, tokens
from jlora.methods import MeteoRA
from jlora.models import decoder
from jlora.routing import reports
from jlora.routing.router import TopK, dense_weights

EXPERTS, TOP, RANK, ROWS, CACHED = 28, 2, 8, 8, 96
ROUNDS, STEPS, WHOLE = 20, 10, 2  # rounds of a seed; steps and whole sequences timed in a round
SOURCES, KERNELS = ("moby_dick", "sotu"), r"layers/(attention|ffn)/\w+/kernel"
NAMES = ("gather", "loop", "all adapters")


@dataclasses.dataclass(frozen=True)
class Looped(MeteoRA):
    """MeteoRA whose experts run one after the other on all tokens, as loops over modules do."""

    def apply(self, x: Any, w: Any, p: Mapping[str, Any], ctx: Mapping[str, Any]) -> Any:
        """x [..., d_in] -> ([..., d_out], reports)."""
        logits = x @ p["gate"]
        routes = TopK(self.top_k).routes(logits, {}, False, None)
        scales = p["scales"].reshape((1,) * (logits.ndim - 1) + (-1,))
        weights = routes.weights * reports.chosen(scales, routes.ids)
        each = dense_weights(routes.ids, weights, self.experts)
        y = x @ w
        for e in range(self.experts):
            y = y + (x @ p["a"][e]) @ p["b"][e] * each[..., e, None]
        return y, reports.report(routes, None)


@functools.cache
def rows() -> tuple[decoder.DecoderConfig, Any, np.ndarray]:
    """Base L and rows of held-out text, [ROWS, CACHED + 1]."""
    base = base_l.load()
    ids = tokens.stream(base.tokenizer, texts.documents(SOURCES), True).astype(np.int32)
    size = CACHED + 1
    return base.config, base.params, ids[: ROWS * size].reshape(ROWS, size)


def adapter_of(config: decoder.DecoderConfig, params: Any, method: Any, seed: int) -> jl.Adapter:
    """Gates and random experts on all kernels; the same values for all methods of one seed."""
    run = functools.partial(decoder.forward, config=config)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    made = jl.init(jax.random.key(seed), run, params, ids, methods={KERNELS: method})
    draw = np.random.default_rng(seed)
    frozen = {}
    for path, arrays in sorted(made.frozen.items()):
        b = draw.normal(size=arrays["b"].shape).astype(np.float32) / 30
        frozen[path] = {**arrays, "b": jnp.asarray(b)}
    return made.replace(frozen=frozen)


def programs(
    config: decoder.DecoderConfig, params: Any, ids: np.ndarray, seed: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """What is timed, by name: steps that give the logits of the next token, and whole sequences.

    Args:
      config: of the decoder.
      params: of the decoder.
      ids: rows, all but the last token of which are cached.
      seed: of gates and experts.
    """
    run = functools.partial(decoder.forward, config=config)
    whole = {"dense": MeteoRA(EXPERTS, TOP, RANK), "loop": Looped(EXPERTS, TOP, RANK)}
    step = {"gather": MeteoRA(EXPERTS, TOP, RANK, backend="gather"), "loop": whole["loop"],
            "all adapters": MeteoRA(EXPERTS, EXPERTS, RANK, backend="gather")}  # fmt: skip
    model = jl.lift(run)

    empty = decoder.empty_cache(config, *ids.shape)
    cache = jax.jit(run)(params, jnp.asarray(ids[:, :-1]), None, None, empty).cache

    @jax.jit
    def following(adapter, token, cache):
        at = jnp.full(token.shape, ids.shape[1] - 1, jnp.int32)
        return model(params, adapter, token, at, None, cache).logits

    @jax.jit
    def sequence(adapter, tokens):
        return model(params, adapter, tokens).logits

    steps, sequences = {}, {}
    for name, method in step.items():
        adapter = adapter_of(config, params, method, seed)
        steps[name] = functools.partial(following, adapter, jnp.asarray(ids[:, -1:]), cache)
    for name, method in whole.items():
        adapter = adapter_of(config, params, method, seed)
        sequences[name] = functools.partial(sequence, adapter, jnp.asarray(ids))
    return steps, sequences


def same(calls: Mapping[str, Callable[[], Any]], one: str, other: str) -> None:
    """Raises ValueError where two programs differ by more than rounding."""
    x, y = (np.asarray(calls[name]()) for name in (one, other))
    gap = float(np.abs(x - y).max())
    if not gap <= 1e-3:
        raise ValueError(f"{one} and {other}: got logits {gap:.2g} apart, expected at most 1e-3")


def timed(
    calls: Mapping[str, Callable[[], Any]], rounds: int, repeat: int, seed: int
) -> dict[str, np.ndarray]:
    """Seconds of one call, [rounds] by name; each round in an order drawn anew.

    Args:
      calls: compiled programs.
      rounds: how often all of them are timed.
      repeat: calls of each in a round.
      seed: of the orders.
    """
    draw, out = np.random.default_rng(seed), {name: np.empty(rounds) for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for n in range(rounds):
        for name in draw.permutation(list(calls)).tolist():
            begin = time.perf_counter()
            for _ in range(repeat):
                jax.block_until_ready(calls[name]())
            out[name][n] = (time.perf_counter() - begin) / repeat
    return out


def run(seed: int, workdir: Any) -> Figures:
    """Logs of seconds per round, one seed."""
    steps, sequences = programs(*rows(), seed)
    same(steps, "gather", "loop")
    same(sequences, "dense", "loop")
    found = timed(steps, ROUNDS, STEPS, seed)
    whole = timed(sequences, ROUNDS, WHOLE, seed)
    more = {f"step, {name}: milliseconds": 1e3 * float(np.median(x)) for name, x in found.items()}
    more |= {f"{ROWS} rows of {CACHED + 1} tokens, {name}: milliseconds": 1e3 * float(np.median(x))
             for name, x in whole.items()}  # fmt: skip
    for name, at, fast in (("step", found, "gather"), ("whole sequences", whole, "dense")):
        more[f"{name}: loop over {fast}"] = float(np.median(at["loop"] / at[fast]))
    names = tuple(f"round {n}" for n in range(ROUNDS))
    return Figures(names, *(tuple(np.log(found[n]).tolist()) for n in NAMES), more=more)


CLAIM = Claim(
    name="meteora_time",
    systems=("MeteoRA",),
    statement=f"seconds of a decoding step of base L, {ROWS} rows, {EXPERTS} adapters at every "
    f"kernel, {TOP} per token: gathered experts < loop over the experts / 3",
    reference="Xu 2024, 2405.13053: about four times as fast as a loop over adapters",
    baseline="a loop over the adapters, each on all tokens, in one compiled program",
    control="the same back-end asked for all adapters of every token",
    unit="log of seconds",
    assets=("stdlib_texts",),
    run=run,
    margin=float(np.log(3)),
    less_is_better=True,
)
