"""The table of all systems: a system that is not in it does not exist.

Tests, documentation and `python -m jlora.systems` are made from `SYSTEMS`. Every method of the
table goes through the laws of `jlora.contract` in the forms given in `examples`; a law that it
breaks by its nature is named in `breaks`, with the reason, and is checked to be broken.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from jlora.core.adapter import Method
from jlora.merging.engine.components import OTHERS, Other
from jlora.merging.engine.table import ROWS, Merging
from jlora.methods import (
    BOFT,
    IA3,
    OFT,
    AdaLoRA,
    BitFit,
    Decomposed,
    DoRA,
    Experts,
    HiRA,
    LNTuning,
    LoCon,
    LoHa,
    LoKr,
    LoRA,
    PiSSA,
    TokenMask,
    TrainableTokens,
    VeRA,
)

KINDS = ("mechanism", "composition", "recipe")
FAMILIES = (
    *("method", "routing", "algebra", "optimizers", "merging", "federated", "ranks"),
    "generation",
)
STATES = ("complete", "partial")


@dataclasses.dataclass(frozen=True)
class System:
    """A row of the table."""

    name: str  # "DoRA"
    paper: str  # first author, year, arXiv number
    family: str  # one of FAMILIES
    kind: str  # one of KINDS: own mechanism, composition of others, or recipe
    module: str  # "jlora.methods.decomposed.dora"
    symbol: str  # what the module exports for it
    tests: tuple[str, ...]  # files
    evidence: str  # what has been measured about it, and where
    state: str = "complete"  # one of STATES
    missing: str = ""  # what a partial system lacks
    examples: tuple[Method, ...] = ()  # tiny forms for the contract suite; of methods only
    breaks: Mapping[str, str] = dataclasses.field(default_factory=dict)  # law -> reason

    def load(self) -> Any:
        """The object itself."""
        return getattr(importlib.import_module(self.module), self.symbol)


CONTRACT = "contract suite; numpy value, limit law and mutation check"
PARITY = "torch PEFT's outputs to 1e-5"
ANY_USE = "a vector may meet any operation, so that none is refused"
NO_MERGE = "the delta depends on the activation, so there is no merged weight"


def _method(
    cls: type[Method],
    paper: str,
    *examples: Method,
    kind: str = "mechanism",
    evidence: str = "",
    peft: bool = False,
    breaks: Mapping[str, str] | None = None,
) -> System:
    module = cls.__module__
    tests = (f"tests/methods/{module.rsplit('.', 1)[1]}_test.py", "tests/contract_test.py")
    tests += ("tests/io/peft/parity_test.py",) if peft else ()
    seen = "; ".join(filter(None, (CONTRACT, evidence, PARITY if peft else "")))
    row = (cls.__name__, paper, "method", kind, module, cls.__name__, tests, seen)
    return System(*row, examples=examples, breaks=breaks or {})


def _other(
    name: str, paper: str, where: str, symbol: str, *, kind: str = "mechanism", evidence: str
) -> System:
    family = {"core": "algebra"}.get(where.split(".")[0], where.split(".")[0])
    tests = (f"tests/{where.replace('.', '/')}_test.py",)
    return System(name, paper, family, kind, f"jlora.{where}", symbol, tests, evidence)


def _merging(row: Merging) -> System:
    """A row of the table of merges; its laws are those of `jlora.merging.engine.laws`."""
    module = row.function.__module__
    tests = row.tests or (f"tests/merging/{module.rsplit('.', 1)[1]}_test.py",)
    seen = (
        module,
        row.function.__name__,
        (*tests, "tests/merging/engine/laws_test.py"),
        row.evidence,
    )
    return System(row.name, row.paper, "merging", row.kind, *seen, breaks=row.breaks)


def _beside(row: Other) -> System:
    tests = row.tests or (f"tests/merging/{row.module.rsplit('.', 1)[1]}_test.py",)
    seen = (row.module, row.symbol, tests, row.evidence)
    return System(row.name, row.paper, "merging", row.kind, *seen)


SYSTEMS: tuple[System, ...] = (
    _method(
        LoRA,
        "Hu 2021, 2106.09685",
        LoRA(rank=2, alpha=3.0),
        LoRA(rank=2, rslora=True, freeze_a=True),
        peft=True,
    ),
    _method(
        DoRA,
        "Liu 2024, 2402.09353",
        DoRA(rank=2),
        evidence="gradient by hand, no dense V in the jaxpr",
        peft=True,
    ),
    _method(LoHa, "Hyeon-Woo 2022, 2108.06098", LoHa(rank=2), peft=True),
    _method(
        LoCon,
        "Yeh 2024, 2309.14859",
        LoCon(rank=2, alpha=3.0),
        evidence="LyCORIS's deltas and outputs to 1e-5, its files back bitwise",
    ),
    _method(
        Decomposed,
        "Liu 2024, 2402.09353; Yeh 2024, 2309.14859",
        Decomposed(LoHa(rank=2)),
        Decomposed(LoKr(rank=1, factor=2)),
        Decomposed(LoRA(rank=2), by="in"),
        evidence="LyCORIS's outputs of DoHa, DoKr and DoRA with cores, by output and by input, to "
        "1e-5, its files back bitwise",
    ),
    _method(
        LoKr,
        "Edalati 2022, 2212.10650; Yeh 2024, 2309.14859",
        LoKr(rank=1, factor=2),
        LoKr(rank=8, factor=2),
        LoKr(rank=1, decompose_both=True),
        evidence="FLOPs of the fast path",
        peft=True,
    ),
    _method(
        VeRA,
        "Kopiczko 2024, 2310.11454",
        VeRA(rank=4),
        evidence="bases from the seed alone",
        peft=True,
    ),
    _method(
        OFT,
        "Qiu 2023, 2306.07280; Qiu 2025, 2506.19847",
        OFT(block=4),
        OFT(block=4, terms=None, share=True),
        evidence="norms and angles kept",
        peft=True,
    ),
    _method(
        BOFT,
        "Liu 2024, 2311.06243",
        BOFT(block=4),
        BOFT(block=2, stages=2),
        evidence="one factor is OFT, reach doubles a stage",
        peft=True,
    ),
    _method(
        AdaLoRA,
        "Zhang 2023, 2303.10512",
        AdaLoRA(rank=2),
        evidence="one number switches a direction, penalty by numpy",
        peft=True,
    ),
    _method(IA3, "Liu 2022, 2205.05638", IA3("out"), IA3("in"), peft=True),
    _method(
        HiRA,
        "Huang 2025, ICLR",
        HiRA(rank=2),
        peft=True,
        breaks={"L4": "W * (1 + AB) has no factored form cheaper than itself"},
    ),
    _method(
        PiSSA,
        "Meng 2024, 2404.02948",
        PiSSA(rank=2),
        kind="composition",
        evidence="principal part against numpy's SVD",
    ),
    _method(
        Experts,
        "Dou 2023, 2312.09979; Gao 2024, 2402.08562",
        Experts(experts=3, top_k=2, rank=2),
        Experts(experts=3, top_k=2, rank=2, backend="gather"),
        Experts(experts=3, top_k=2, rank=2, backend="ragged"),
        evidence="equal back-ends, reports through aux",
        breaks={"L3": NO_MERGE},
    ),
    _method(
        TokenMask,
        "Greenewald 2025, 2504.12397",
        TokenMask(LoRA(rank=2)),
        kind="composition",
        evidence="one shared matmul",
        breaks={"L3": NO_MERGE},
    ),
    _method(
        TrainableTokens,
        "none (practice; PEFT 0.21)",
        TrainableTokens((0, 5)),
        evidence="lookups by numpy; PEFT's golden adapter",
        breaks={"L4": "outside of lookups the merged table is formed"},
    ),
    _method(
        LNTuning,
        "Zhao 2023, 2312.11420",
        LNTuning(),
        evidence="torch PEFT's outputs to 1e-5, its files back bitwise",
        breaks={"L10": ANY_USE},
    ),
    _method(
        BitFit,
        "Ben Zaken 2021, 2106.10199",
        BitFit(),
        evidence="torch PEFT's outputs of LoRA with biases to 1e-5, its files back bitwise",
        breaks={"L10": ANY_USE},
    ),
    _other(
        "Top-k router with balance loss",
        "Fedus 2021, 2101.03961",
        "routing.router",
        "top_k",
        evidence="identities and landmarks of the loss; mutation check",
    ),
    _other(
        "Sparse dispatch",
        "our reading",
        "routing.dispatch",
        "dispatch",
        evidence="numpy value; equal gradients of three back-ends; bank under vmap",
    ),
    _other(
        "Factored delta algebra",
        "Panariello 2025 (core space); textbook",
        "core.algebra",
        "svd",
        evidence="dense numpy oracles; certificate of truncation; cancellation; mutation check",
    ),
    _other(
        "LoRA+",
        "Hayou 2024, 2402.12354",
        "optimizers.lora_plus",
        "lora_plus",
        evidence="one step by numpy; two learning rates of optax; half the steps of one rate",
    ),
    *map(_merging, ROWS),
    *map(_beside, OTHERS),
    _other(
        "Conditional P-Diff: 1-D convolutional U-Net",
        "Jin 2024, 2408.01415",
        "generation.unet1d",
        "UNet1d",
        evidence="forward against the docstring; step rows; null condition",
    ),
    _other(
        "Conditional P-Diff: convolutional autoencoder",
        "Jin 2024, 2408.01415",
        "generation.codec_conv",
        "ConvAE",
        evidence="layers against torch; latent sizes of the paper; loss and noise by numpy",
    ),
    _other(
        "Token autoencoder",
        "our reading after LoRAGen, ICLR 2026",
        "generation.codec_token",
        "TokenAE",
        evidence="learns; loss by numpy; unit latents",
    ),
    _other(
        "PCA codec",
        "textbook",
        "generation.codec_pca",
        "fit",
        evidence="against scikit-learn; lossless at n - 1 components",
    ),
    _other(
        "Canonical factors",
        "W2T 2026, 2603.15990; Schönemann 1966",
        "generation.canonical",
        "canonicalise",
        evidence="delta kept and gauge removed; dense SVD by numpy; mutation check",
    ),
    _other(
        "DiT over site tokens",
        "Peebles 2023, 2212.09748",
        "generation.dit",
        "DiT",
        evidence="forward against the docstring; identity at init; symmetries",
    ),
    _other(
        "Dispersive loss",
        "Wang 2025, 2506.09027",
        "generation.dispersive",
        "dispersive_loss",
        evidence="formulas by numpy; landmarks; mutation check",
    ),
    _other(
        "DDPM, DDIM, Euler and Heun samplers",
        "Ho 2020, 2006.11239; Song 2021, 2010.02502; Lipman 2023, 2210.02747",
        "generation.samplers",
        "sample",
        evidence="discrete posterior; exact Gaussian denoiser; orders of convergence",
    ),
    _other(
        "Classifier-free guidance",
        "Ho 2022, 2207.12598",
        "generation.guidance",
        "guided",
        evidence="extrapolation by numpy; commutes with conversion of predictions",
    ),
    _other(
        "Parameter average",
        "Polyak 1992; Kingma 2015",
        "generation.ema",
        "average",
        evidence="recursion by numpy; fixed point",
    ),
    _other(
        "FedIT, the average of factors",
        "Zhang 2023, 2305.05644",
        "federated.fedavg",
        "fedavg",
        evidence="numpy value; how far it is from the average of the deltas",
    ),
    _other(
        "FLoRA",
        "Wang 2024, 2409.05976",
        "federated.flora",
        "flora",
        kind="composition",
        evidence="exact for clients of other ranks and alpha, on a model; p squared is seen",
    ),
    _other(
        "FedEx-LoRA",
        "Singhal 2024, 2410.09432",
        "federated.fedex",
        "fedex",
        evidence="mean and residual are exact; tail of a cut residual; mutation check",
    ),
    _other(
        "FlexLoRA",
        "Bai 2024, 2402.11505",
        "federated.flexlora",
        "flexlora",
        kind="composition",
        evidence="best of each rank by dense SVD; mutation check",
    ),
    _other(
        "HetLoRA",
        "Cho 2024, 2401.06432",
        "federated.hetlora",
        "hetlora",
        evidence="numpy value; idle clients do not dilute; self-pruning; mutation check",
    ),
    _other(
        "FFA-LoRA",
        "Sun 2024, 2403.12313",
        "federated.ffa",
        "ffa",
        evidence="exact; alpha and rate are one setting; noise is linear; mutation check",
    ),
    _other(
        "Fed-SB",
        "Singhal 2025, 2502.15436",
        "federated.fed_sb",
        "fed_sb",
        evidence="exact; bases by dense SVD; gradient of the core through the bases",
    ),
    _other(
        "LoRA-FAIR",
        "Bian 2024, 2411.14961",
        "federated.lora_fair",
        "lora_fair",
        evidence="closed form is stationary; cosine reaches it; equal clients unchanged",
    ),
    _other(
        "LoRA-Squeeze",
        "Vulić 2026, 2602.10993",
        "ranks.squeeze",
        "squeeze",
        evidence="tail by dense SVD; moments by gradients and simulation; annealed beats cut",
    ),
    _other(
        "Adapter soups",
        "Wortsman 2022, 2203.05482",
        "generation.soup",
        "delta_soups",
        kind="composition",
        evidence="exact at full rank, certified below; mutation check",
    ),
    _other(
        "Nearest-condition and softmax soups",
        "our reading",
        "generation.nearest",
        "softmax",
        kind="composition",
        evidence="similarities by numpy; limits; temperature by leave-one-task-out",
    ),
    _other(
        "Kernel ridge from condition to adapter",
        "Saunders 1998; Cawley 2004",
        "generation.ridge",
        "choose",
        evidence="leave-one-task-out against a refit loop; limits",
    ),
    _other(
        "Span projection",
        "our reading",
        "generation.span",
        "affine_weights",
        evidence="against least squares; members are reached",
    ),
    _other(
        "Audit of generated adapters",
        "Zeng 2025; our reading",
        "generation.audit",
        "novelty_ratio",
        evidence="distances against dense; copies score zero, new seeds one",
    ),
)


def methods() -> dict[str, System]:
    """The rows of methods by name."""
    return {s.name: s for s in SYSTEMS if s.family == "method"}


def table() -> str:
    """The registry as aligned text, one system a line."""
    head = ("system", "family", "kind", "state", "paper", "evidence")
    rows = [(s.name, s.family, s.kind, _state(s), s.paper, _evidence(s)) for s in SYSTEMS]
    width = [max(len(r[k]) for r in (head, *rows)) for k in range(5)]
    lines = [head, tuple("-" * w for w in width), *rows]
    return "\n".join(
        "  ".join([*(c.ljust(w) for c, w in zip(r, width, strict=False)), *r[5:]]).rstrip()
        for r in lines
    )


def _state(s: System) -> str:
    return f"{s.state}: {s.missing}" if s.missing else s.state


def _evidence(s: System) -> str:
    return s.evidence + "".join(f"; not {law} ({why})" for law, why in s.breaks.items())
