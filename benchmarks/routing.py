r"""Tokens that choose 2 of E low-rank experts: the back-ends of `jlora.routing` against loops.

``python -m benchmarks.routing``: one site, ``y = x W + dispatch(x, experts, routes)``, 8 or 28
experts of rank 8 on tokens of width 256: 1024 of them (training) or 8 (an answer that grows).
``dense``, ``gather`` and ``ragged`` are jlora's; the peers are

==============  ===============================================================================
``loop``        JAX, a loop over the experts, each on all tokens, its gate zero for most
``torch_loop``  torch, for each expert the tokens that chose it, added back by their indices
``peft``        the layer of PEFT's X-LoRA, given the same gates, with its choice of the top 2
==============  ===============================================================================

All compute the same function, which is checked before anything is timed. Per case
``EXPERTSxTOKENS``: ``best``, the fastest back-end, and peer time / its time as ``ratio_vs_loop``,
``ratio_vs_torch_loop`` and ``ratio_vs_peft``; the same of value and gradient (of experts and
gates) as ``grad_ratio_vs_loop`` and ``grad_ratio_vs_torch_loop`` (PEFT's experts are frozen).
``default_over_best`` is the time of "dense", the default, over that of the fastest.
"""

import functools
import operator
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peft import LoraConfig, XLoraConfig, inject_adapter_in_model
from peft.tuners.xlora.layer import XLoraLinearLayer

from benchmarks import timing
from jlora.routing.dispatch import BACKENDS, dispatch
from jlora.routing.router import dense_weights

CHOSEN = 2  # experts of a token


class Case(NamedTuple):
    """Tokens, experts and who goes where, in NumPy."""

    x: np.ndarray  # [t, d]
    w: np.ndarray  # [d, d]
    a: np.ndarray  # [E, d, r]
    b: np.ndarray  # [E, r, d]
    ids: np.ndarray  # [t, CHOSEN]
    gates: np.ndarray  # [t, CHOSEN], positive


def case(experts: int, tokens: int, width: int, rank: int) -> Case:
    """Random tokens and experts; every expert is equally likely."""
    draw = np.random.default_rng([experts, tokens])

    def normal(*shape: int) -> np.ndarray:
        return (draw.normal(size=shape) / np.sqrt(shape[-2])).astype("f4")

    scores = draw.normal(size=(tokens, experts))
    ids = np.argsort(-scores, axis=-1)[:, :CHOSEN].astype(np.int32)
    gates = np.exp(np.take_along_axis(scores, ids, -1))
    gates = (gates / gates.sum(-1, keepdims=True)).astype("f4")
    x = draw.normal(size=(tokens, width)).astype("f4")
    shapes = (width, width), (experts, width, rank), (experts, rank, width)
    return Case(x, *(normal(*s) for s in shapes), ids, gates)


def loop(x: Any, a: Any, b: Any, ids: Any, gates: Any) -> jax.Array:
    """Every expert on all tokens, one after the other."""
    weights = dense_weights(ids, gates, len(a))
    parts = ((x @ a[e]) @ b[e] * weights[:, e, None] for e in range(len(a)))
    return functools.reduce(operator.add, parts)


def ours(given: Case) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """Values, and values with gradients, of the back-ends and the loop."""
    x, w, a, b, ids, gates = (jnp.asarray(t) for t in given)
    values, gradients = {}, {}

    def pair(experts: Callable[..., Any]) -> tuple[Any, Any]:
        def value(x, w, a, b, ids, gates):
            return x @ w + experts(x, a, b, ids, gates)

        def loss(a, b, gates, x, w, ids):
            return jnp.mean(value(x, w, a, b, ids, gates) ** 2)

        return jax.jit(value), jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))

    for name in (*BACKENDS, "loop"):

        def experts(*args: Any, name: str = name) -> jax.Array:
            return loop(*args) if name == "loop" else dispatch(*args, backend=name)

        value, gradient = pair(experts)
        values[name] = lambda f=value: jax.block_until_ready(f(x, w, a, b, ids, gates))
        gradients[name] = lambda f=gradient: jax.block_until_ready(f(a, b, gates, x, w, ids))
    return values, gradients


def torch_loop(given: Case) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Each expert on the tokens that chose it: value, and value with gradients."""
    x, w, a, b, ids, gates = (torch.tensor(t) for t in given)
    trained = [t.requires_grad_() for t in (a, b, gates)]

    def value() -> torch.Tensor:
        y = x @ w
        for e in range(len(a)):
            token, place = torch.where(ids == e)
            y = y.index_add(0, token, (x[token] @ a[e]) @ b[e] * gates[token, place, None])
        return y

    def gradient() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(value().square().mean(), trained)

    return torch.inference_mode()(value), gradient


def peft_layer(given: Case) -> Callable[[], torch.Tensor]:
    """PEFT's X-LoRA at one linear layer, its gates given instead of predicted."""
    experts, width, rank = given.a.shape
    module = torch.nn.Sequential(torch.nn.Linear(width, given.w.shape[1], bias=False))
    names = [f"e{k}" for k in range(experts)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is more than one adapter
        for name in names:
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
            inject_adapter_in_model(config, module, adapter_name=name)
    layer: Any = module[0]
    layer.set_adapter(names)
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor(given.w.T))
        for name, a, b in zip(names, given.a, given.b, strict=True):
            layer.lora_A[name].weight.copy_(torch.tensor(a.T))
            layer.lora_B[name].weight.copy_(torch.tensor(b.T))
    config = XLoraConfig(hidden_size=width, adapters={}, top_k_lora=CHOSEN)
    whole: Any = types.SimpleNamespace(disabled=False)
    routed = XLoraLinearLayer(whole, layer, layer.forward, 0, config)
    x = torch.tensor(given.x)[None]
    gates = np.array(dense_weights(jnp.asarray(given.ids), jnp.asarray(given.gates), experts))
    scalings = torch.tensor(gates)[None, :, None, :]
    return torch.inference_mode()(lambda: routed.forward(x, scalings=scalings)[0])


def _same(results: dict[str, Any], what: str) -> None:
    """Raises RuntimeError where results differ by more than rounding."""
    want = [np.asarray(t) for t in results["dense"]]
    for name, got in results.items():
        for one, other in zip(got, want, strict=True):
            gap = np.abs(np.asarray(one) - other).max() / np.abs(other).max()
            if not gap < 1e-4:
                raise RuntimeError(f"{name}: {what}: differs by {gap:.1e} of the largest")


def measure(settings: timing.Settings) -> dict[str, Any]:
    torch.set_num_threads(settings.threads)
    sizes = [(3, 4)] if settings.quick else [(8, 1024), (28, 1024), (8, 8), (28, 8)]
    width, rank = (16, 2) if settings.quick else (256, 8)
    times: dict[str, Any] = {}
    for experts, tokens in sizes:
        given, label = case(experts, tokens, width, rank), f"{experts}x{tokens}"
        values, gradients = ours(given)
        values["torch_loop"], gradients["torch_loop"] = torch_loop(given)
        values["peft"] = peft_layer(given)
        _same({n: [run()] for n, run in values.items()}, "values")
        _same({n: run() if n == "torch_loop" else run()[1] for n, run in gradients.items()}, "grad")
        figures: dict[str, Any] = {"ms": {}}
        for prefix, runs in (("", values), ("grad_", gradients)):
            count = settings.count(100)
            seconds = timing.interleave(runs, count, settings, f"{prefix}{label}", limit=20)
            ms = timing.best(seconds)
            best = min(BACKENDS, key=ms.__getitem__)
            figures |= {f"{prefix}best": best, f"{prefix}default_over_best": ms["dense"] / ms[best]}
            peers = runs.keys() - set(BACKENDS)
            figures |= {f"{prefix}ratio_vs_{p}": ms[p] / ms[best] for p in sorted(peers)}
            figures["ms"] |= {prefix + n: v for n, v in timing.spread(seconds).items()}
        times[label] = figures
    return times


if __name__ == "__main__":
    timing.main("routing", measure)
