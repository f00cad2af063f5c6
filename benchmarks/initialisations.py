r"""Starts of LoRA from weights and data, against PEFT's own: 24 layers of 1024 x 1024, rank 16.

``python -m benchmarks.initialisations`` (most of its time is PEFT's EVA). The model is
:math:`x \leftarrow x + 0.3 \tanh(x W_k)` with random weights, the data are 4 batches of 512 rows.
One call is everything a user waits for: the statistics of the data where a start needs them, the
decompositions of all sites, and the adapter. Of two calls the faster one counts; both compile or
trace what they need anew where the library does.

- ``pissa``: the exact SVD of the weights; ``pissa_4``: the randomised one, 4 power iterations;
- ``olora``: their QR factors;
- ``eva``: the leading directions of the inputs, ranks shared out over the sites (rho = 2);
- ``corda``: the SVD of the weights times the inputs' second moments;
- ``lora_ga``: the directions of the gradient of a loss;
- ``loftq``: what 4 bits lose; PEFT's needs a GPU and is not compared.

``<start>/ratio_vs_peft`` is PEFT's time / jlora's, ``<start>/memory_vs_peft`` the same of the peak
memory of a call above what is held before (model, weights, data). PEFT changes its base weights in
place, jlora leaves the parameters alone and keeps the start as frozen factors. ``gap`` is the
distance of the two products A B, relative, where both define the same one (PEFT's CorDA divides
each batch by its largest entry).
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jlora as jl
from benchmarks import merging, timing

PATTERN, ALPHA = "layers", 32.0
SAME = ("pissa", "olora")  # of which both sides define one product A B


class Task(NamedTuple):
    """Weights [layers, d, d], batches of rows [n, d], the rank."""

    params: dict[str, jax.Array]
    batches: list[jax.Array]
    rank: int


def task(quick: bool) -> Task:
    """Random weights and rows; more rows than d, so that their moments have full rank."""
    layers, size, rows, rank = (2, 16, 16, 2) if quick else (24, 1024, 512, 16)
    rng = np.random.default_rng(0)
    w = rng.normal(size=(layers, size, size)) / size**0.5
    x = rng.normal(size=(4, rows, size)) * np.linspace(0.2, 2.0, size)
    batches = [jnp.asarray(b, jnp.float32) for b in x]
    return Task({"layers": jnp.asarray(w, jnp.float32)}, batches, rank)


def model(params: Any, x: jax.Array) -> jax.Array:
    """The layers, one after the other."""
    return jax.lax.scan(lambda x, w: (x + 0.3 * jnp.tanh(x @ w), None), x, params["layers"])[0]


def loss(params: Any, x: jax.Array) -> jax.Array:
    """What LoRA-GA differentiates."""
    return jnp.mean(model(params, x) ** 2)


def ours(task: Task) -> dict[str, Callable[[], Any]]:
    """A call of each start in jlora."""
    methods, params, batches = {PATTERN: jl.LoRA(task.rank, ALPHA)}, task.params, task.batches
    key, block = jax.random.key(0), min(64, batches[0].shape[1])  # entries per scale of LoftQ
    starts = {
        "pissa": lambda: jl.inits.pissa(model, params, batches, methods=methods),
        "pissa_4": lambda: jl.inits.pissa(
            model, params, batches, methods=methods, niter=4, key=key
        ),
        "olora": lambda: jl.inits.olora(model, params, batches, methods=methods),
        "eva": lambda: jl.inits.eva(model, params, batches, methods=methods, center=True),
        "corda": lambda: jl.inits.corda(model, params, batches, methods=methods),
        "lora_ga": lambda: jl.inits.lora_ga(loss, params, batches, methods=methods),
        "loftq": lambda: jl.inits.loftq(model, params, batches, methods=methods, block=block),
    }
    return {name: lambda call=call: jax.block_until_ready(call()) for name, call in starts.items()}


class Chain(torch.nn.Module):
    """The same model in torch."""

    def __init__(self, weights: np.ndarray):
        super().__init__()
        size = weights.shape[-1]
        self.layers = torch.nn.ModuleList(torch.nn.Linear(size, size, bias=False) for _ in weights)
        for layer, w in zip(self.layers, weights, strict=True):
            layer.weight.data = torch.tensor(np.ascontiguousarray(w.T))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + 0.3 * torch.tanh(layer(x))
        return x


def theirs(task: Task) -> Iterator[tuple[str, timing.Fresh]]:
    """A call of each start in PEFT, which uses its model up."""
    import peft
    from peft.tuners.lora.config import CordaConfig, LoraGAConfig
    from peft.tuners.lora.corda import preprocess_corda
    from peft.tuners.lora.loraga import preprocess_loraga

    weights = np.asarray(task.params["layers"])
    batches = [torch.tensor(np.asarray(b)) for b in task.batches]
    names = [f"layers.{k}" for k in range(len(weights))]

    def config(kind: str, **more: Any) -> Any:
        return peft.LoraConfig(
            r=task.rank, lora_alpha=int(ALPHA), target_modules=names, init_lora_weights=kind, **more
        )  # type: ignore[arg-type]

    def plain(kind: str) -> Callable[[Any], Any]:
        return lambda model: peft.get_peft_model(model, config(kind))

    def eva(model: Any) -> Any:
        adapted = peft.get_peft_model(model, config("eva", eva_config=peft.EvaConfig(rho=2.0)))
        peft.initialize_lora_eva_weights(
            adapted, batches, forward_fn=lambda m, b: m(b), prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None, show_progress_bar=False,
        )  # fmt: skip
        return adapted

    def corda(model: Any) -> Any:
        chosen = config("corda", corda_config=CordaConfig(corda_method="ipm"))

        def run() -> None:
            with torch.no_grad():
                for b in batches:
                    model(b)

        preprocess_corda(model, chosen, run_model=run)
        return peft.get_peft_model(model, chosen)

    def lora_ga(model: Any) -> Any:
        chosen = config("lora_ga", lora_ga_config=LoraGAConfig())

        def run() -> None:
            for b in batches:
                torch.mean(model(b) ** 2).backward()

        preprocess_loraga(model, chosen, run)
        return peft.get_peft_model(model, chosen)

    calls = {"pissa": plain("pissa"), "pissa_4": plain("pissa_niter_4"), "olora": plain("olora")}
    for name, call in (calls | {"eva": eva, "corda": corda, "lora_ga": lora_ga}).items():
        yield name, timing.Fresh(lambda: Chain(weights), call)


def timed(
    run: timing.Fresh, settings: timing.Settings
) -> tuple[Any, float, float | None]:  # fmt: skip
    """(result, ms of the faster of two calls, peak MiB of the second)."""
    took, kept = [], []

    def call(model: Any) -> None:
        kept.clear()
        start = settings.clock()
        kept.append(run.run(model))
        took.append(settings.clock() - start)

    memory = timing.transient_mib(timing.Fresh(run.make, call))
    return kept.pop(), 1e3 * min(took), memory


def products(adapter: Any) -> np.ndarray:
    """A B of every layer, [layers, d, d], of a `Residual(LoRA)`."""
    p = adapter.trainable[PATTERN]
    return np.asarray(jnp.einsum("lir,lro->lio", p["a"], p["b"]))


def measure(settings: timing.Settings) -> dict[str, Any]:
    torch.set_num_threads(settings.threads)
    given = task(settings.quick)
    figures: dict[str, Any] = {}
    results = {}
    for name, call in ours(given).items():
        fresh = timing.Fresh(lambda: None, lambda _, call=call: call())
        results[name], ms, memory = timed(fresh, settings)
        figures[name] = {"ms": ms, "mib": memory}
        timing.note(f"initialisations: {name} {ms:.0f} ms")
    for name, fresh in theirs(given):
        adapted, ms, memory = timed(fresh, settings)
        one = figures[name] | {
            "peft_ms": ms,
            "peft_mib": memory,
            "ratio_vs_peft": ms / figures[name]["ms"],
        }
        one["memory_vs_peft"] = memory / max(one["mib"], 0.1) if memory is not None else None
        if name in SAME:
            layers = adapted.base_model.model.layers
            parts = [(m.lora_B["default"].weight @ m.lora_A["default"].weight).T for m in layers]
            want = torch.stack(parts).detach().numpy()
            one["gap"] = merging.gap(products(results[name]), want)
        figures[name] = one
        timing.note(f"initialisations: peft {name} {ms:.0f} ms")
    sizes = {"layers": len(given.params["layers"]), "size": given.batches[0].shape[1]}
    return figures | {"shape": sizes | {"rank": given.rank, "rows": given.batches[0].shape[0]}}


if __name__ == "__main__":
    timing.main("initialisations", measure, threads=(1,))
