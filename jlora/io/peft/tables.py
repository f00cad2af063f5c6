"""The tables of the library's methods, and which table reads or writes what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jlora.core.method import Method
from jlora.io.peft.bases import PVERA, RANDLORA
from jlora.io.peft.blocks import BAT_TABLE, C3A_TABLE, GRALORA, MISS
from jlora.io.peft.lora import ADALORA, DORA, HIRA, KASA, LORA
from jlora.io.peft.lycoris import LOHA, LOKR
from jlora.io.peft.rotations import DELORA, HRA_TABLE, ROAD
from jlora.io.peft.seeded import FOURIERFT, SHIRA, SUPERTUNING, WAVEFT
from jlora.io.peft.shared_vectors import UNILORA, VBLORA
from jlora.io.peft.spectral import FROD, OSF_TABLE
from jlora.io.peft.started import OLORA, PISSA
from jlora.io.peft.table import Table
from jlora.io.peft.tinylora import TINYLORA
from jlora.io.peft.types import OTHERS
from jlora.io.peft.vera_oft_ia3 import (
    BEFT_TABLE,
    BOFT_TABLE,
    IA3_TABLE,
    LN_TUNING,
    OFT_TABLE,
    TOKENS,
    VERA,
)
from jlora.io.peft.weight_led import DEFT_TABLE, GLORA, PEANUT
from jlora.methods.low_rank.pissa import PiSSA
from jlora.methods.wrappers.residual import Residual
from jlora.types import Json

TABLES: tuple[Table, ...] = (
    *(PISSA, OLORA, KASA, LORA, DORA, HIRA, ADALORA, LOHA, LOKR),
    *(VERA, OFT_TABLE, BOFT_TABLE, IA3_TABLE, LN_TUNING, BEFT_TABLE, TOKENS),
    *(BAT_TABLE, MISS, C3A_TABLE, GRALORA),  # BAT is a form of MISS
    *(HRA_TABLE, ROAD, DELORA),
    *(VBLORA, UNILORA, TINYLORA),
    *(SHIRA, SUPERTUNING, FOURIERFT, WAVEFT),
    *(RANDLORA, PVERA),
    *(PEANUT, DEFT_TABLE, GLORA),
    *(OSF_TABLE, FROD),
)


def table_for(config: Mapping[str, Json], more: Sequence[Table] = ()) -> Table:
    """The table that reads files of a config.

    Args:
      config: its fields.
      more: tables that are tried before the library's.

    Returns:
      The first that fits.

    Raises:
      ValueError: the library has no method for its ``peft_type``.
    """
    tables = (*more, *TABLES)
    for table in tables:
        if table.type == config["peft_type"] and all(
            (config.get(k) == v if isinstance(v, str) else bool(config.get(k)) == v)
            for k, v in table.choose.items()
        ):
            return table
    known = sorted({table.type for table in tables})
    kind = config["peft_type"]
    why = OTHERS.get(kind, "fields of its config choose a form" if kind in known else "unknown")
    raise ValueError(f"peft_type {kind!r} cannot be read ({why}); these can: {known}")


def table_of(method: Method) -> Table:
    """The table of a method: its own (`method.peft`) or the library's.

    Args:
      method: of an adapter.

    Returns:
      The table.

    Raises:
      ValueError: PEFT has no such method.
    """
    own = getattr(method, "peft", None)
    if own is not None:
        return own
    for table in TABLES:
        if table.writes and type(method) is table.method:
            return table
    if isinstance(method, Residual | PiSSA):
        way = "give its weights as params, or write jl.inits.fold(adapter)"
    elif method.merges:
        way = ("jl.merging.to_lora(adapter, params) makes LoRA of it and says the error, "
               "jl.merge bakes it into the weights")  # fmt: skip
    else:
        way = (
            "its delta depends on the activation, so no LoRA is equal; jl.io.save_adapter keeps it"
        )
    known = sorted({table.method.__name__ for table in TABLES if table.writes})
    raise ValueError(
        f"PEFT's files have no place for {type(method).__name__} ({way}); these can be written, "
        f"and methods with a `peft` table: {known}"
    )
