r"""The variants of the study: what each trains for a rank, and its tags.

A variant maps the rank r of the study to about as many trained numbers as LoRA of that rank has,
where its form allows (methods on shared bases have fewer, by design). The middle of its grid of
learning rates is that of its claim file, where it has one on these tasks.

Tags are four axes after He et al. 2026 (2601.22708): rank (the form of the delta), optimisation,
initialisation, mixture of experts. They are computed from the room that the records of its systems
are in, so a variant cannot be tagged by hand.
"""

from collections.abc import Callable
from typing import NamedTuple

import optax

import jlora as jl
from experiments.variant_study import schedules, starts
from experiments.variant_study.training import Schedule
from jlora import methods, optimizers, registry
from jlora.types import Dynamic

# one pattern, so that what a method shares, it shares over all four kernels
ATTENTION = "layers/attention/(query|key|value|out)/kernel"
AXES = {  # the start of a module's name -> the axis; the first that fits
    "jlora.methods.routed": "mixture of experts",
    "jlora.methods.low_rank.pissa": "initialisation",  # LoRA that starts elsewhere
    "jlora.methods": "rank",
    "jlora.schedules": "rank",
    "jlora.inits": "initialisation",
    "jlora.optimizers": "optimisation",
    "jlora.penalties": "optimisation",
    "jlora.routing": "mixture of experts",
}
Solver = Callable[[Dynamic], optax.GradientTransformation]  # of a schedule of rates


class Variant(NamedTuple):
    """A row of the study."""

    name: str
    systems: tuple[str, ...]  # names of records
    method: Callable[[int], Dynamic]  # rank of the study -> method of an attention kernel
    rate: float  # the middle of the grid of learning rates
    solver: Solver = optax.adam
    start: starts.Start | None = None  # from data or weights, instead of `jl.init`
    schedule: Callable[[int, int, int], Schedule] | None = None  # (rank, steps, matrices)
    change: Callable[[jl.Adapter, int], jl.Adapter] | None = None  # (fresh adapter, seed)

    @property
    def tags(self) -> tuple[str, ...]:
        """The axes that its systems are on.

        Raises:
          ValueError: no record has the name of one of its systems, or no axis fits its module.
        """
        modules = {p.system.name: p.module for p in registry.systems()}
        result = []
        for name in self.systems:
            if name not in modules:
                raise ValueError(f"{self.name}: systems: got {name!r}, expected a record's name")
            axis = next((a for m, a in AXES.items() if modules[name].startswith(m)), None)
            if axis is None:
                raise ValueError(f"{self.name}: {modules[name]} is on none of the four axes")
            result.append(axis)
        return tuple(dict.fromkeys(result))


def _lora(rank: int) -> jl.LoRA:
    """LoRA at scale 1."""
    return jl.LoRA(rank=rank, alpha=float(rank))


def _plus(rate: Dynamic) -> optax.GradientTransformation:
    """LoRA+ on Adam."""
    return optax.chain(optax.adam(rate), optimizers.lora_plus(16.0))


def _on_gradients(rule: Callable[[], optax.GradientTransformation], adam: bool = True) -> Solver:
    """A change of gradients before Adam, or before the learning rate alone."""
    middle = [optax.scale_by_adam()] if adam else []
    return lambda rate: optax.chain(rule(), *middle, optax.scale_by_learning_rate(rate))


def _one(name: str, method: Callable[[int], Dynamic], rate: float) -> Variant:
    """A variant that is one system."""
    return Variant(name, (name,), method, rate)


def _solved(name: str, rate: float, solver: Solver) -> Variant:
    """LoRA by another optimizer."""
    return Variant(name, (name,), _lora, rate, solver)


def _started(
    name: str, rate: float, start: starts.Start, method: Callable[[int], Dynamic] = _lora
) -> Variant:
    """LoRA from another start."""
    return Variant(name, (name,), method, rate, start=start)


VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        _one("LoRA", _lora, 8e-3),
        _one("PiSSA", lambda r: methods.PiSSA(rank=r, alpha=float(r)), 1e-3),
        _one("DoRA", lambda r: methods.DoRA(rank=r, alpha=float(r)), 8e-3),
        _one("DeLoRA", lambda r: methods.DeLoRA(rank=r), 8e-3),
        _one("KaSA", lambda r: methods.KaSA(rank=r, alpha=float(r)), 8e-3),
        _one("HiRA", lambda r: methods.HiRA(rank=r), 3e-2),
        _one("LoHa", lambda r: methods.LoHa(rank=-(-r // 2), alpha=float(-(-r // 2))), 1e-2),
        _one("LoKr", lambda r: methods.LoKr(rank=r, alpha=float(r)), 1e-2),
        _one("BlockLoRA", lambda r: methods.BlockLoRA(2 * r, 2.0 * r, 2), 5e-3),
        _one("LoRAXS", lambda r: methods.LoRAXS(rank=4 * r, alpha=4.0 * r), 8e-3),
        _one("LoLDU", lambda r: methods.LoLDU(rank=8 * r, alpha=8.0 * r), 2e-2),
        _one("MiSS", lambda r: methods.MiSS(rank=2 * r), 1e-3),
        _one("BAT", lambda r: methods.BAT(block=2 * r), 1e-3),
        _one("GraLoRA", lambda r: methods.GraLoRA(rank=2 * r, alpha=2.0 * r), 8e-3),
        _one("OFT", lambda r: methods.OFT(block=4 * r), 3e-3),
        _one("HRA", lambda r: methods.HRA(rank=2 * r), 1e-2),
        _one("RoAd", lambda r: methods.RoAd(group=4 * r), 2e-2),
        _one("VeRA", lambda r: methods.VeRA(rank=16 * r), 2e-2),
        _one("RandLoRA", lambda r: methods.RandLoRA(rank=48 // r, alpha=20.0 * (48 // r)), 5e-3),
        _one("UniLoRA", lambda r: methods.UniLoRA(rank=r, size=64 * r), 2e-2),
        _one("NOLA", lambda r: methods.NOLA(rank=r, alpha=float(r), bases=48 * r), 5e-2),
        _one("TeRA", lambda r: methods.TeRA(rank=4 * r), 2e-2),
        _one("FourierFT", lambda r: methods.FourierFT(count=256 * r), 1e-1),
        _one("SHiRA", lambda r: methods.SHiRA(rank=r), 3e-3),
        _one("IA3", lambda r: methods.IA3(), 3e-2),
        # optimizers
        _solved("LoRA+", 1e-3, _plus),
        _solved("LoRA-FA", 8e-3, _on_gradients(optimizers.lora_fa)),
        _solved("Riemannian preconditioning", 1e-3, _on_gradients(optimizers.riemannian)),
        _solved("LoRA-Pro", 1e-3, _on_gradients(optimizers.lora_pro)),
        _solved(
            "AltLoRA+", 1e-2, _on_gradients(lambda: optimizers.alt_lora(adaptive=True), adam=False)
        ),
        # initialisations
        _started("OLoRA", 1e-3, starts.olora),
        _started("EVA", 8e-3, starts.eva),
        _started("CorDA", 1e-3, starts.corda),
        _started("LoRA-GA", 3e-3, starts.lora_ga),
        _started("NLoRA", 1e-3, starts.nlora),
        _started("LoRA-SB", 3e-3, starts.lora_sb, lambda r: _lora(4 * r)),
        # schedules
        Variant(
            "AdaLoRA", ("AdaLoRA", "AdaLoRA allocation"),
            lambda r: methods.AdaLoRA(rank=r + r // 2, alpha=float(r + r // 2)), 8e-3,
            schedule=schedules.adalora,
        ),
        Variant("DyLoRA", ("DyLoRA",), _lora, 8e-3, schedule=schedules.dylora),
        Variant("SoRA", ("SoRA",), _lora, 8e-3, schedules.proximal, change=schedules.gated),
        # mixtures of experts
        _one("Experts", lambda r: methods.Experts(4, 2, -(-r // 4), alpha=float(-(-r // 4))), 8e-3),
    )
}  # fmt: skip
