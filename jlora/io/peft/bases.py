"""PEFT tables of methods whose random bases all modules share: RandLoRA, PVeRA.

=========  ==================================================  ====================================
type       PEFT's tensors                                      ours
=========  ==================================================  ====================================
RANDLORA   randlora_lambda [r, N], randlora_gamma [N, d]       lam, gamma
           of all: randlora_A [r, 1, d], randlora_B [D, N, r]  basis_a [r, d], basis_b
           (in the file once more under every module)
PVERA      pvera_lambda_b [out], pvera_lambda_d [2 r]          b, d
           of all: pvera_A [2 r, in], pvera_B [out, r]         basis_a, basis_b, transposed
=========  ==================================================  ====================================

With ``save_projection: false`` the bases are drawn again from ``projection_prng_key``. Not so those
of RandLoRA that are not sparse: PEFT draws them in bfloat16 where torch finds a device for it and
in float16 elsewhere, which are other numbers, so the file alone is not the function; it is refused.

Source: peft 0.21.2, its files and read for its behaviour.
Deviates: drawn bases of RandLoRA may differ from torch's in the last bit: they are divided by their
standard deviation, whose sum torch orders in its own way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from jlora.core.site import Site
from jlora.io.peft.table import Arrays, Read, Slice, Table, alpha_of, scale_of, want_shape
from jlora.methods.shared_basis.pvera import PVeRA
from jlora.methods.shared_basis.randlora import RandLoRA
from jlora.torch_random import Generator
from jlora.types import Json


def _seed(config: Mapping[str, Json]) -> int | None:
    """The seed of bases that the file leaves out; None where it must hold them."""
    seed = config.get("projection_prng_key")
    return seed if config.get("save_projection") is False and type(seed) is int else None


def _places(p: Arrays, site: Site, *names: str) -> None:
    """Raises ValueError unless the site uses the first rows of the bases, as in PEFT."""
    sizes = {"rows": site.d_in, "cols": site.d_out}
    for name in names:
        if not np.array_equal(p[name], np.arange(sizes[name])):
            raise ValueError(f"PEFT takes the first rows of a basis; got other {name}")


# --- RandLoRA -----------------------------------------------------------------------------------


def _write_randlora(method: RandLoRA, site: Site, p: Arrays) -> Slice:
    _places(p, site, "rows", "cols")
    rank = p["lam"].shape[0]
    fields = {"r": rank, "randlora_alpha": alpha_of(method, p["scale"], rank)}
    return Slice({"randlora_lambda": p["lam"], "randlora_gamma": p["gamma"]}, fields)


def _read_randlora(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    rank, alpha = fields["r"], fields["randlora_alpha"]
    scale = scale_of(alpha, rank)
    small, large = sorted((site.d_in, site.d_out))
    count = -(-small // rank)
    want_shape("randlora_lambda", t["randlora_lambda"], (rank, count))
    want_shape("randlora_gamma", t["randlora_gamma"], (count, small))
    a, b = t["randlora_A"].shape, t["randlora_B"].shape
    if len(a) != 3 or a[:2] != (rank, 1) or a[2] < small:
        raise ValueError(f"randlora_A has shape {list(a)}, expected [{rank}, 1, {small} or more]")
    if len(b) != 3 or b[0] < large or b[1] < count or b[2] != rank:
        raise ValueError(
            f"randlora_B has shape {list(b)}, expected [{large}, {count}, {rank}] or more, but "
            f"for the last"
        )
    sizes = {"rows": site.d_in, "cols": site.d_out}
    frozen = {name: np.arange(size, dtype=np.int32) for name, size in sizes.items()}
    trainable = {"lam": t["randlora_lambda"], "gamma": t["randlora_gamma"]}
    return Read(RandLoRA(rank, alpha), trainable, {**frozen, "scale": scale})


def _regrow_randlora(
    config: Mapping[str, Json], modules: Sequence[tuple[Site, Arrays]]
) -> Arrays | None:
    """Bases of a seed, of -1, 0, 1 (`sparse`, `very_sparse`), over their deviation.

    None of others: PEFT draws them in bfloat16 or float16, as the machine likes.
    """
    seed, ranks = _seed(config), {t["randlora_lambda"].shape[0] for _, t in modules}
    thin = config.get("sparse") or config.get("very_sparse")
    if seed is None or len(ranks) != 1 or not thin:
        return None
    rank, draw = ranks.pop(), Generator(seed)
    small, large = sorted((max(s.d_in for s, _ in modules), max(s.d_out for s, _ in modules)))
    count = -(-small // rank)
    edge = 1 / (2 * (math.sqrt(small) if config.get("very_sparse") else 3))
    parts = [draw.uniform(shape, 0.0, 1.0) for shape in ((rank, 1, small), (large, count, rank))]
    parts = [(t > 1 - edge).astype(np.float32) - (t < edge) for t in parts]
    a, b = (t / np.float32(np.std(t.astype(np.float64), ddof=1)) for t in parts)
    return {"randlora_A": a.astype(np.float32), "randlora_B": b.astype(np.float32)}


# --- PVeRA --------------------------------------------------------------------------------------


def _write_pvera(method: PVeRA, site: Site, p: Arrays) -> Slice:
    _places(p, site, "rows")
    return Slice({"pvera_lambda_b": p["b"], "pvera_lambda_d": p["d"]}, {"r": p["d"].size // 2})


def _read_pvera(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    rank = fields["r"]
    want_shape("pvera_lambda_b", t["pvera_lambda_b"], (site.d_out,))
    want_shape("pvera_lambda_d", t["pvera_lambda_d"], (2 * rank,))
    a, b = t["pvera_A"].shape, t["pvera_B"].shape
    if len(a) != 2 or a[0] != 2 * rank or a[1] < site.d_in:
        raise ValueError(f"pvera_A has shape {list(a)}, expected [{2 * rank}, {site.d_in} or more]")
    if len(b) != 2 or b[0] < site.d_out or b[1] != rank:
        raise ValueError(f"pvera_B has shape {list(b)}, expected [{site.d_out} or more, {rank}]")
    trainable = {"b": t["pvera_lambda_b"], "d": t["pvera_lambda_d"]}
    return Read(PVeRA(rank), trainable, {"rows": np.arange(site.d_in, dtype=np.int32)})


def _regrow_pvera(
    config: Mapping[str, Json], modules: Sequence[tuple[Site, Arrays]]
) -> Arrays | None:
    """Bases of a seed: Kaiming's uniform numbers."""
    seed, sizes = _seed(config), {t["pvera_lambda_d"].size for _, t in modules}
    if seed is None or len(sizes) != 1:
        return None
    rank, draw = sizes.pop() // 2, Generator(seed)
    rows, cols = max(s.d_in for s, _ in modules), max(s.d_out for s, _ in modules)
    bounds = [math.sqrt(3) * (math.sqrt(2) / math.sqrt(fan)) for fan in (rows, rank)]
    a = draw.uniform((2 * rank, rows), -bounds[0], bounds[0])
    return {"pvera_A": a, "pvera_B": draw.uniform((cols, rank), -bounds[1], bounds[1])}


RANDLORA = Table(
    type="RANDLORA",
    method=RandLoRA,
    layouts=(("randlora_lambda", "randlora_gamma"),),
    fields={"r": 32, "randlora_alpha": 640},
    write=_write_randlora,
    read=_read_randlora,
    free={
        "bias": "none",
        "fan_in_fan_out": False,
        "init_weights": True,
        "projection_prng_key": 0,
        "randlora_dropout": 0.0,
        "save_projection": True,
        "sparse": False,
        "very_sparse": False,
    },
    lacks=("exclude_modules",),
    shared=("randlora_A", "randlora_B"),
    copied=True,
    write_shared=lambda p: {"randlora_A": p["basis_a"][:, None], "randlora_B": p["basis_b"]},
    read_shared=lambda t: {"basis_a": t["randlora_A"][:, 0], "basis_b": t["randlora_B"]},
    regrow=_regrow_randlora,
)

PVERA = Table(
    type="PVERA",
    method=PVeRA,
    layouts=(("pvera_lambda_b", "pvera_lambda_d"),),
    fields={"r": 256},
    write=_write_pvera,
    read=_read_pvera,
    fixed={"sample_at_inference": False},  # PEFT's output is then another one every time
    free={
        "bias": "none",
        "d_initial": 0.1,
        "fan_in_fan_out": False,
        "generator_seed": None,
        "init_weights": True,
        "projection_prng_key": 0,
        "pvera_dropout": 0.0,
        "save_projection": True,
    },
    lacks=("exclude_modules",),
    shared=("pvera_A", "pvera_B"),
    write_shared=lambda p: {"pvera_A": p["basis_a"].T, "pvera_B": p["basis_b"].T},
    read_shared=lambda t: {"basis_a": t["pvera_A"].T, "basis_b": t["pvera_B"].T},
    regrow=_regrow_pvera,
)
