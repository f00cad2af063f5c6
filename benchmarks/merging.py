r"""What the merge benchmarks share: banks of random adapters, and the same ones in PEFT.

A bank is ``adapters`` adapters of rank ``r`` on ``sites`` linear layers of ``d x d``,

.. math:: \Delta_n = u_n v_n, \qquad u_n \in R^{d \times r}, \; v_n \in R^{r \times d}

with entries of :math:`v` small, as those of a trained LoRA's ``b`` are. ``Peft`` holds them as
adapters of a ``PeftModel``; a merge is `add_weighted_adapter`, and the merged adapter is deleted
before the next.

Reference: the public interfaces. Deviates: nothing.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import timing
from jlora.algebra import LowRank

Bank = dict[str, LowRank]  # site -> u [N, d, r], v [N, r, d]


def bank(adapters: int, sites: int, size: int, rank: int, seed: int = 0) -> Bank:
    """Random adapters that share half of their directions, so that merging has something to do."""
    rng = np.random.default_rng(seed)

    def one() -> LowRank:
        u = rng.normal(size=(adapters, size, rank)) + rng.normal(size=(size, rank))
        v = rng.normal(size=(adapters, rank, size)) + rng.normal(size=(rank, size))
        u, v = u / size**0.5, 0.02 * v
        return LowRank(jnp.asarray(u, jnp.float32), jnp.asarray(v, jnp.float32))

    return {f"layer{k}": one() for k in range(sites)}


class Peft:
    """The adapters of a bank on torch linear layers, in PEFT."""

    def __init__(self, bank: Bank, threads: int):
        import peft

        torch.set_num_threads(threads)
        low = next(iter(bank.values()))
        (n, size, rank), names = low.u.shape, list(bank)
        layers = {k: torch.nn.Linear(size, size, bias=False) for k in names}
        base = torch.nn.ModuleDict(layers)
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
        self.names = [f"number{k}" for k in range(n)]
        self.model: Any = peft.get_peft_model(base, config, self.names[0])  # type: ignore[arg-type]
        for name in self.names[1:]:
            self.model.add_adapter(name, config)
        with torch.no_grad():
            for site, (u, v) in bank.items():
                layer = self.model.base_model.model[site]
                for k, name in enumerate(self.names):
                    layer.lora_A[name].weight.copy_(torch.tensor(np.asarray(u[k]).T.copy()))
                    layer.lora_B[name].weight.copy_(torch.tensor(np.asarray(v[k]).T.copy()))

    def merge(self, weights: Any, kind: str, **options: Any) -> None:
        """`add_weighted_adapter` of all as "merged", which is deleted before."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if "merged" in self.model.peft_config:
                self.model.delete_adapter("merged")
            self.model.add_weighted_adapter(
                self.names, list(map(float, weights)), "merged", combination_type=kind, **options
            )

    def product(self, site: str) -> np.ndarray:
        """The merged delta of a site [d_in, d_out], after `merge`."""
        layer = self.model.base_model.model[site]
        a, b = layer.lora_A["merged"].weight, layer.lora_B["merged"].weight
        return (b @ a).detach().numpy().T.copy()


def each(site: Callable[..., Any], bank: Bank, *rest: Any) -> Callable[[], Any]:
    """A run of a jitted merge over all sites, one after the other; done when it returns."""

    def run() -> Any:
        return jax.block_until_ready({path: site(low, *rest) for path, low in bank.items()})

    return run


def few(
    runs: Mapping[str, Callable[[], Any]], settings: timing.Settings, label: str
) -> tuple[dict[str, float], dict[str, float | None]]:
    """({name: ms}, {name: peak MiB}) of runs of which a call takes long: two calls of each.

    The time is that of the faster call, the memory that of the second one.
    """
    ms, memory = {}, {}
    for name, run in runs.items():
        took: list[float] = []

        def timed(run: Callable[[], Any] = run, took: list[float] = took) -> None:
            start = settings.clock()
            run()
            took.append(settings.clock() - start)

        memory[name] = timing.transient_mib(timed)
        ms[name] = 1e3 * min(took)
        timing.note(f"{label} {name} {ms[name]:.1f} ms")
    return ms, memory


def temp_mib(site: Callable[..., Any], *args: Any) -> float:
    """XLA's temporary memory of a jitted function, in MiB."""
    compiled: Any = jax.jit(site).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def ratios(ms: Mapping[str, float], ours: str = "jlora") -> dict[str, float]:
    """{ratio_vs_<peer>: peer time / our time}."""
    return {f"ratio_vs_{k}": t / ms[ours] for k, t in ms.items() if k != ours}


def gap(x: Any, y: Any) -> float:
    """|x - y| / |y|, Frobenius."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))
