"""PEFT tables of VeRA, OFT, BOFT and IA3, for matrices [out, in], and of vectors and rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from jlora.core.site import Site
from jlora.io.peft.table import (
    Arrays,
    Fields,
    Read,
    Slice,
    Table,
    want_shape,
)
from jlora.io.torch_random import Generator
from jlora.methods.orthogonal.boft import BOFT
from jlora.methods.orthogonal.oft import OFT
from jlora.methods.selective.beft import OutputBias
from jlora.methods.selective.ia3 import IA3
from jlora.methods.selective.ln_tuning import LNTuning
from jlora.methods.selective.trainable_tokens import TrainableTokens
from jlora.methods.shared_basis.vera import VeRA
from jlora.types import Dynamic, Json

# --- VeRA: delta^T = diag(b) B diag(d) A, bases shared ------------------------------------------


def _write_vera(method: VeRA, site: Site, p: Arrays) -> Slice | None:
    if not p["b"].any() and not p["d"].any():
        return None
    if not np.array_equal(p["rows"], np.arange(site.d_in)):
        raise ValueError("PEFT's VeRA takes the first rows of the basis; got others")
    return Slice({"vera_lambda_b": p["b"], "vera_lambda_d": p["d"]}, {"r": p["d"].size})


def _read_vera(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    want_shape("vera_lambda_b", t["vera_lambda_b"], (site.d_out,))
    want_shape("vera_lambda_d", t["vera_lambda_d"], (fields["r"],))
    for key, need in (("vera_A", site.d_in), ("vera_B", site.d_out)):
        shape = t[key].shape
        rank, size = (shape if key == "vera_A" else shape[::-1]) if len(shape) == 2 else (0, 0)
        if rank != fields["r"] or size < need:
            raise ValueError(
                f"{key} has rank {rank} and size {size}, expected {fields['r']}, {need}"
            )
    trainable = {"b": t["vera_lambda_b"], "d": t["vera_lambda_d"]}
    return Read(VeRA(fields["r"]), trainable, {"rows": np.arange(site.d_in, dtype=np.int32)})


def _write_bases(shared: Arrays) -> Arrays:
    return {"vera_A": shared["basis_a"].T, "vera_B": shared["basis_b"].T}


def _read_bases(t: Arrays) -> Arrays:
    return {"basis_a": t["vera_A"].T, "basis_b": t["vera_B"].T}


def _regrow_bases(
    config: Mapping[str, Json], modules: Sequence[tuple[Site, Arrays]]
) -> Arrays | None:
    """The bases of ``save_projection: false``: Kaiming-uniform draws of ``projection_prng_key``."""
    seed, ranks = config.get("projection_prng_key"), {t["vera_lambda_d"].size for _, t in modules}
    if config.get("save_projection") is not False or type(seed) is not int or len(ranks) != 1:
        return None
    rank, generator = ranks.pop(), Generator(seed)
    rows, cols = max(s.d_in for s, _ in modules), max(s.d_out for s, _ in modules)
    bounds = [math.sqrt(3) * (math.sqrt(2) / math.sqrt(fan)) for fan in (rows, rank)]
    a = generator.uniform((rank, rows), -bounds[0], bounds[0])
    return {"vera_A": a, "vera_B": generator.uniform((cols, rank), -bounds[1], bounds[1])}


# --- OFT: x R W ---------------------------------------------------------------------------------


def _write_oft(method: OFT, site: Site, p: Arrays) -> Slice:
    if method.terms in (2, 3):
        raise ValueError(f"PEFT has another series for {method.terms} terms; expected 4 or more")
    exact = method.terms is None  # PEFT's exact form is the transpose of its series: -Q
    fields = {
        "block_share": method.share,
        "num_cayley_neumann_terms": 5 if exact else method.terms,
        "oft_block_size": method.block,
        "r": 1 if method.share else p["q"].shape[0],
        "use_cayley_neumann": not exact,
    }
    return Slice({"oft_R.weight": -p["q"] if exact else p["q"]}, fields)


def _read_oft(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    q, share = t["oft_R.weight"], fields["block_share"]
    block = (1 + math.isqrt(1 + 8 * q.shape[-1])) // 2
    if block < 2 or site.d_in % block:
        raise ValueError(f"oft_R.weight {list(q.shape)}: blocks of {block} in {site.d_in} inputs")
    want_shape("oft_R.weight", q, (1 if share else site.d_in // block, block * (block - 1) // 2))
    exact, terms = not fields["use_cayley_neumann"], fields["num_cayley_neumann_terms"]
    if not exact and terms < 3:
        raise ValueError(f"num_cayley_neumann_terms = {terms}, expected 3 or more")
    method = OFT(block=block, terms=None if exact else max(terms, 4), share=share)
    return Read(method, {"q": -q if exact else q}, {})


def _settle_oft(modules: Mapping[str, Fields]) -> tuple[Mapping[str, Fields], Fields]:
    """One of block size and number of blocks is 0 and follows from the other, for all modules."""
    zero = "r" if len({f["oft_block_size"] for f in modules.values()}) == 1 else "oft_block_size"
    return {module: {**fields, zero: 0} for module, fields in modules.items()}, {}


# --- BOFT: (x M_{m-1} ... M_0 W) * s ------------------------------------------------------------


def _write_boft(method: BOFT, site: Site, p: Arrays) -> Slice:
    fields = {
        "boft_block_num": p["r"].shape[1],
        "boft_block_size": method.block,
        "boft_n_butterfly_factor": method.stages,
    }
    return Slice({"boft_R": p["r"], "boft_s": p["s"][:, None]}, fields)


def _read_boft(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    r, size, count = t["boft_R"], fields["boft_block_size"], fields["boft_block_num"]
    if (size > 0) == (count > 0) or site.d_in % (size or count):
        raise ValueError(
            f"boft_block_size = {size} and boft_block_num = {count}, expected one that divides "
            f"{site.d_in} inputs, the other 0"
        )
    block, declared = size or site.d_in // count, fields["boft_n_butterfly_factor"]
    stages = r.shape[0] if r.ndim else 0
    if stages not in (1, declared):  # without its CUDA kernel PEFT makes one, whatever is declared
        raise ValueError(f"boft_R has {stages} factors, expected {declared} or 1")
    want_shape("boft_R", r, (stages, site.d_in // block, block, block))
    want_shape("boft_s", t["boft_s"], (site.d_out, 1))
    if site.d_in % (2 ** (stages - 1) * block):
        raise ValueError(f"{stages} factors with blocks of {block} in {site.d_in} inputs")
    return Read(BOFT(block, stages), {"r": r, "s": t["boft_s"][:, 0]}, {})


def _settle_boft(modules: Mapping[str, Fields]) -> tuple[Mapping[str, Fields], Fields]:
    """One of block size and number of blocks is 0 and follows from the other, for all modules."""
    one = len({f["boft_block_size"] for f in modules.values()}) == 1
    zero = "boft_block_num" if one else "boft_block_size"
    return {module: {**fields, zero: 0} for module, fields in modules.items()}, {}


# --- IA3: y * l or x * l ------------------------------------------------------------------------


def _write_ia3(method: IA3, site: Site, p: Arrays) -> Slice:
    out = method.side == "out"
    tensors = {"ia3_l": p["l"][:, None] if out else p["l"][None, :]}
    return Slice(tensors, {"feedforward_modules": not out})


def _read_ia3(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    size, side = (site.d_in, "in") if t["ia3_l"].shape[0] == 1 else (site.d_out, "out")
    want_shape("ia3_l", t["ia3_l"], (1, size) if side == "in" else (size, 1))
    return Read(IA3(side=side), {"l": t["ia3_l"].reshape(size)}, {})


def _settle_ia3(modules: Mapping[str, Fields]) -> tuple[Mapping[str, Fields], Fields]:
    """PEFT lists the modules that scale their input."""
    inner = sorted(module for module, fields in modules.items() if fields["feedforward_modules"])
    return {module: {} for module in modules}, {"feedforward_modules": inner}


# --- vectors, which `vectors` reads and writes, and rows, which `tokens` writes ------------------

LN_LAYERS = "ln_tuning_layers"
BIAS = "beft_bias"
ROWS = "trainable_tokens_delta"


def _no_module(*_: Dynamic) -> Dynamic:
    raise ValueError("this is of vectors or rows, not of the matrix of a module")


def _write_output_bias(method: OutputBias, site: Site, p: Arrays) -> Slice:
    return Slice({BIAS: p["bias"][None]}, {})


def _read_output_bias(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    want_shape(BIAS, t[BIAS], (1, site.d_out))
    return Read(OutputBias(), {"bias": t[BIAS][0]}, {})


def _read_rows(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    ids, rows = fields["token_indices"], t[ROWS]
    if "gather" not in site.ops:
        raise ValueError("TRAINABLE_TOKENS of what is no embedding table")
    if not all(0 <= i < site.d_in for i in ids):
        raise ValueError(f"token_indices = {repr(ids)[:80]}, expected rows below {site.d_in}")
    want_shape(ROWS, rows, (len(ids), site.d_out))
    return Read(TrainableTokens(tuple(ids)), {"rows": rows}, {})


VERA = Table(
    type="VERA",
    method=VeRA,
    layouts=(("vera_lambda_b", "vera_lambda_d"),),
    fields={"r": 256},
    write=_write_vera,
    read=_read_vera,
    free={
        "bias": "none",
        "d_initial": 0.1,
        "fan_in_fan_out": False,
        "init_weights": True,
        "projection_prng_key": 0,
        "save_projection": True,
        "vera_dropout": 0.0,
    },
    lacks=("exclude_modules",),
    sparse=True,
    shared=("vera_A", "vera_B"),
    write_shared=_write_bases,
    read_shared=_read_bases,
    regrow=_regrow_bases,
)

OFT_TABLE = Table(
    type="OFT",
    method=OFT,
    layouts=(("oft_R.weight",),),
    fields={
        "block_share": False,
        "num_cayley_neumann_terms": 5,
        "oft_block_size": 32,
        "r": 0,
        "use_cayley_neumann": True,
    },
    write=_write_oft,
    read=_read_oft,
    fixed={"coft": False},
    free={
        "bias": "none",
        "eps": 6e-5,  # of coft only
        "fan_in_fan_out": False,
        "init_weights": True,
        "module_dropout": 0.0,
    },
    needs=("use_cayley_neumann", "num_cayley_neumann_terms"),
    settle=_settle_oft,
)

BOFT_TABLE = Table(
    type="BOFT",
    method=BOFT,
    layouts=(("boft_R", "boft_s"),),
    fields={"boft_block_num": 0, "boft_block_size": 4, "boft_n_butterfly_factor": 1},
    write=_write_boft,
    read=_read_boft,
    free={"bias": "none", "boft_dropout": 0.0, "fan_in_fan_out": False, "init_weights": True},
    settle=_settle_boft,
)

IA3_TABLE = Table(
    type="IA3",
    method=IA3,
    layouts=(("ia3_l",),),
    fields={},
    write=_write_ia3,
    read=_read_ia3,
    free={"fan_in_fan_out": False, "feedforward_modules": None, "init_ia3_weights": True},
    lacks=("layers_pattern", "layers_to_transform"),
    biased=lambda method: isinstance(method, IA3) and method.side == "out",
    settle=_settle_ia3,
)

LN_TUNING = Table(
    type="LN_TUNING",
    method=LNTuning,
    layouts=tuple(
        tuple(f"{LN_LAYERS}.{leaf}" for leaf in leaves)
        for leaves in (("weight", "bias"), ("weight",), ("bias",))
    ),
    fields={},
    write=_no_module,
    read=_no_module,
    lacks=("layers_pattern", "layers_to_transform"),
)

BEFT_TABLE = Table(
    type="BEFT",
    method=OutputBias,  # of modules without a bias; of the others `vectors` makes BEFT
    layouts=((BIAS,),),
    fields={},
    write=_write_output_bias,
    read=_read_output_bias,
    free={"init_weights": True},
    lacks=("exclude_modules", "layers_pattern", "layers_to_transform"),
)

TOKENS = Table(
    type="TRAINABLE_TOKENS",
    method=TrainableTokens,
    layouts=((ROWS,),),
    fields={"token_indices": ()},
    write=_no_module,
    read=_read_rows,
    writes=False,
    free={"init_weights": True},
    lacks=("exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save"),
)
