r"""Methods around LoRA that PEFT says in the config: invocation tokens, and starts it makes again.

======================  ======================  ================================================
jlora                   config                  what PEFT does
======================  ======================  ================================================
`TokenMask(LoRA)`       alora_invocation_tokens  the adapter acts from the last occurrence of these
                                                tokens on, in every row (Activated LoRA)
`Residual(LoRA)`,       init_lora_weights       subtracts the start from the base whenever it makes
`PiSSA`                 "pissa" or "olora"      the adapter: the start has to be that of the weight
======================  ======================  ================================================

The mask of a `TokenMask` is an input of a call; `invoked` makes PEFT's from the tokens of a batch:
with i the last place where the invocation sequence :math:`q_1 .. q_m` begins,

.. math:: c_t = [t \ge i], \qquad i = \max \{ j : x_{j + k - 1} = q_k, \; k = 1 .. m \}

and no token where there is none. Any other start is written as LoRA of twice the rank by
`jl.inits.fold`, which is what PEFT makes of one too.

Source: peft 0.21.2, its files and its behaviour.
Deviates: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jlora.core.adapter import Adapter
from jlora.core.lift import flatten
from jlora.core.site import Site
from jlora.inits.olora import orthonormal
from jlora.inits.residual import start_factors, without_start
from jlora.inits.start import matrices
from jlora.io.errors import FormatError
from jlora.io.peft.table import Fields, trim
from jlora.methods.low_rank.lora import LoRA
from jlora.methods.low_rank.pissa import PiSSA, principal
from jlora.methods.wrappers.residual import Residual
from jlora.methods.wrappers.token_mask import TokenMask
from jlora.types import Dynamic, Json, Tree

FIELD, START = "alora_invocation_tokens", "init_lora_weights"
CLOSE = 1e-5  # of the largest weight: how far a start may be from the one PEFT makes


def split(folder: Path, adapter: Adapter, params: Tree) -> tuple[Adapter, Fields]:
    """Takes wrappers off an adapter that the config can say.

    Args:
      folder: where it goes, for errors.
      adapter: of any sites.
      params: the base parameters, for starts; None: an adapter with one is left as it is.

    Returns:
      (the adapter without wrappers, config fields); as it is, and {}, where it has none.

    Raises:
      FormatError: masks at some sites only, around another method than LoRA, or without invocation
        tokens; a start that PEFT would not make from the weight.
    """
    if any(isinstance(m, TokenMask) for _, m in adapter.sites):
        return _without_masks(folder, adapter)
    started = all(isinstance(m, PiSSA | Residual) for _, m in adapter.sites) and adapter.sites
    if params is None or not started:
        return adapter, {}
    return _without_starts(folder, adapter, params)


def _without_masks(folder: Path, adapter: Adapter) -> tuple[Adapter, Fields]:
    sequences, rows = set[tuple[int, ...]](), []
    for site, mask in adapter.sites:
        if not isinstance(mask, TokenMask) or type(mask.method) is not LoRA or set(site.ops) - {
            "dot"
        }:  # fmt: skip
            raise FormatError(folder, f"{site.path}: got {mask} on {site.ops}, expected TokenMask "
                              "around LoRA on a matrix, at every site: PEFT has one mask for an "
                              "adapter")  # fmt: skip
        sequences.add(mask.invocation)
        rows.append((site, mask.method))
    if len(sequences) != 1 or not all(sequences):
        raise FormatError(folder, f"TokenMask: got the invocations {sorted(sequences)}, expected "
                          "one token sequence: PEFT has no other mask")  # fmt: skip
    ids = _checked(folder, list(sequences.pop()))
    return adapter.replace(sites=tuple(rows)), {FIELD: ids}


def _checked(path: Path, ids: Json) -> list[int]:
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise FormatError(path, f"{FIELD} = {repr(ids)[:80]}, expected token numbers, at least one")
    return ids


def _without_starts(folder: Path, adapter: Adapter, params: Tree) -> tuple[Adapter, Fields]:
    leaves, words = flatten(params)[0], set[str]()
    short = without_start(adapter)
    rows: Dynamic = zip(adapter.sites, short.sites, strict=True)
    for (site, method), (_, lora) in rows:
        if site.path not in leaves:
            raise FormatError(folder, f"{site.path}: got no such weight in params")
        u, v = start_factors(adapter, site, method)
        start = np.asarray(u, np.float64) @ np.asarray(v, np.float64)
        w = np.asarray(matrices(site, leaves[site.path]))
        p = {k: np.asarray(t) for k, t in short.arrays(site)[0].items()}  # a, b, scale
        for index in np.ndindex(*site.stack):
            one, where = {k: t[index] for k, t in p.items()}, f"{site.path}{list(index)}"
            if trim(one, lora.rank_axes)[0] != lora.rank:
                raise FormatError(folder, f"{where}: got ranks that are zero, which PEFT has no "
                                  "start of; write jl.inits.fold(adapter)")  # fmt: skip
            gaps = _gaps(site, w[index], start[index], lora.rank, float(one["scale"]))
            word, near = min(gaps, key=gaps.__getitem__), CLOSE * np.abs(w[index]).max()
            if gaps[word] > near:
                raise FormatError(folder, f"{where}: the start is {gaps[word]:.1e} from {word}'s, "
                                  "which PEFT makes from the weight, expected at most "
                                  f"{near:.1e}; write jl.inits.fold(adapter)")  # fmt: skip
            words.add(word)
    if len(words) != 1:
        raise FormatError(folder, f"got starts of {sorted(words)}, expected one for all sites")
    return short, {START: words.pop()}


def _gaps(
    site: Site, w: np.ndarray, start: np.ndarray, rank: int, scale: float
) -> dict[str, float]:
    """How far the start of one matrix is from each that PEFT makes, the largest entry."""
    weight = jnp.asarray(w, site.param_dtype)
    makers: Mapping[str, Dynamic] = {
        "pissa": lambda: principal(None, weight, rank, scale, None),  # type: ignore[arg-type]
        "olora": lambda: orthonormal(weight, rank),
    }
    gaps = {}
    for word, make in makers.items():
        a, b = (np.asarray(t, np.float64) for t in make())
        gaps[word] = float(np.abs(start - scale * a @ b).max())
    return gaps


def taken(path: Path, config: Mapping[str, Json]) -> tuple[dict[str, Json], list[int] | None]:
    """The invocation tokens of a config.

    Args:
      path: of the config, for errors.
      config: its fields.

    Returns:
      (the config without them, the tokens or None).

    Raises:
      FormatError: a field that is no list of token numbers.
    """
    ids = config.get(FIELD)
    if ids is None:
        return dict(config), None
    return {**config, FIELD: None}, _checked(path, ids)


def masked(path: Path, adapter: Adapter, ids: Sequence[int]) -> Adapter:
    """An adapter of LoRA behind masks, as invocation tokens in a config mean.

    Args:
      path: of the config, for errors.
      adapter: what the file holds.
      ids: the tokens.

    Returns:
      Of `TokenMask` at every site; calls need the mask, such as `invoked` makes, in the context.

    Raises:
      FormatError: another method, for which PEFT has no such form.
    """
    for site, method in adapter.sites:
        if type(method) is not LoRA:
            raise FormatError(path, f"{FIELD}: {site.path}: got {method}, expected LoRA")
    rows = ((site, TokenMask(m, invocation=tuple(ids))) for site, m in adapter.sites)
    return adapter.replace(sites=tuple(rows))


def invoked(
    ids: Int[Array, "*batch t"], invocation_tokens: Sequence[int]
) -> Bool[Array, "*batch t"]:
    """On which tokens of a batch an Activated LoRA acts: `ctx["tokens"]` of a `TokenMask`.

    Args:
      ids: tokens of whole inputs.
      invocation_tokens: the sequence, `invocation` of a `TokenMask`.

    Returns:
      True from the start of its last occurrence on; False everywhere in rows without one.

    Raises:
      ValueError: no tokens.
    """
    if not len(invocation_tokens):
        raise ValueError("invocation_tokens: got none, expected at least one")
    ids, place = jnp.asarray(ids), jnp.arange(ids.shape[-1], dtype=jnp.int32)
    hits = jnp.ones(ids.shape, bool)
    for k, token in enumerate(invocation_tokens):
        later = jnp.roll(ids, -k, axis=-1) == token
        hits &= later & (place + k < ids.shape[-1]).reshape((1,) * (ids.ndim - 1) + (-1,))
    return _from_last(hits)


def _from_last(hits: Bool[Array, "*batch t"]) -> Bool[Array, "*batch t"]:
    """True from the last True on."""
    after = jnp.flip(jnp.cumsum(jnp.flip(hits, -1).astype(jnp.int32), axis=-1), -1)
    later = after - hits.astype(jnp.int32)  # hits behind a place
    return (later == 0) & (jnp.max(after, axis=-1, keepdims=True) > 0)
