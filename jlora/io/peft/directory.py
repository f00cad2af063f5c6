"""Adapters as PEFT's directories, `adapter_config.json` and `adapter_model.safetensors`, both ways.

Neither torch nor PEFT is needed. These files know files and names; what the tensors of a method are
is in its `Table`. What is not understood is refused as a whole: no adapter is returned, no file
changed.

A stacked site is one torch module an index. Modules that a file leaves alone come back as zeros,
ranks that differ within a stack are padded with zeros (both are no adapter, and stay none under
gradient descent), and neither is written again: reading and writing is the identity, bitwise.

Source: peft 0.21.2, its files and its behaviour.
Deviates: target_modules lists whole module names; no README.md is written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from jlora.core.adapter import Adapter
from jlora.core.bank import one_adapter
from jlora.io import fused, safetensors_file, whole_file
from jlora.io.errors import FormatError, keys_seen
from jlora.io.model_sites import model_sites
from jlora.io.names import NameMap
from jlora.io.peft import config as peft_config
from jlora.io.peft import parameters as peft_parameters
from jlora.io.peft import replication, wrapped
from jlora.io.peft import tokens as peft_tokens
from jlora.io.peft import vectors as peft_vectors
from jlora.io.peft.among import regrown, related
from jlora.io.peft.lora import MATRIX, TABLE
from jlora.io.peft.read import (
    ROOT,
    Modules,
    by_module,
    check_bias,
    check_modules,
    check_rest,
    join,
    read_files,
)
from jlora.io.peft.table import Arrays, Fields, Read, Table, check_site, scale_of
from jlora.io.peft.tables import table_of
from jlora.io.peft.vera_oft_ia3 import BEFT_TABLE, ROWS
from jlora.io.peft.write import extra_tensors, torch_side
from jlora.io.slices import sliced
from jlora.methods.low_rank.lora import LoRA
from jlora.methods.selective.beft import BEFT, OutputBias
from jlora.methods.selective.ln_tuning import LNTuning
from jlora.types import Dynamic, Json, Tree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_peft(
    path: str | os.PathLike[str],
    adapter: Adapter,
    names: NameMap,
    base_model_name: str | None = None,
    task_type: str | None = None,
    *,
    extras: Mapping[str, Json] | None = None,
    params: Tree = None,
    layer_replication: replication.Replication | None = None,
) -> None:
    """Writes `adapter` as a directory that PEFT 0.21.2 loads.

    Args:
      path: the directory; created if missing, its two files replaced.
      adapter: one adapter, no bank; all sites of one method that PEFT knows, and alongside LoRA and
        DoRA tables of which some rows are trained (`TrainableTokens`). Biases (`BitFit`) and norms
        (`LNTuning`) may be trained next to a method with `bias` and `modules_to_save`. `TokenMask`
        and starts (`Residual`, `PiSSA`) around LoRA are what `jlora.io.peft.wrapped` says.
      names: from site paths to torch modules.
      base_model_name: ``base_model_name_or_path`` of the config; None: PEFT asks for the base.
      task_type: such as ``"CAUSAL_LM"``; None: a plain `PeftModel`.
      extras: weights of the base model to go with it, by torch name: ``modules_to_save``
        (``{"classifier.weight": [out, in], ...}``) and biases of adapted modules; None: none.
      params: the base parameters; required where PEFT scales biases as well (IA3), to see that
        there are none, and for a start, to see that PEFT makes the same one; None elsewhere.
      layer_replication: what the layers were expanded by with `replicate_layers`; None: they were
        not.

    Raises:
      FormatError: the files cannot say what the adapter is.
      ValueError: a site has no name, or the adapter is a bank.
    """
    one_adapter(adapter, "save_peft")
    folder = Path(path)
    adapter, said = wrapped.split(folder, sliced(adapter, names), params)
    rows_alone = peft_tokens.alone(folder, adapter, names)
    beft = any(isinstance(method, BEFT) for _, method in adapter.sites)
    adapter, rows, token_ids = peft_tokens.split(adapter, names)
    adapter, vectors, alone = peft_vectors.split(folder, adapter, names)
    adapter, bare, parameters = peft_parameters.split(folder, adapter, names)
    if vectors and not alone and not adapter.sites and not parameters:
        raise FormatError(folder, "PEFT has no adapter of biases alone (BitFit), expected LoRA too")
    if rows_alone is not None:
        tensors, fields, table = rows_alone
    elif beft:
        tensors, fields, table = _beft_side(folder, adapter, names)
    elif alone:
        tensors, fields, table = peft_vectors.torch_side(vectors)
    elif parameters and not adapter.sites:
        tensors, fields, table = {}, {}, table_of(LoRA())
    else:
        tensors, fields, table = torch_side(folder, adapter, names, params)
    try:
        fields, common = table.settle(fields)
    except ValueError as error:
        raise FormatError(folder, str(error)) from error
    common = {**common, "base_model_name_or_path": base_model_name, "task_type": task_type}
    if vectors and not alone:
        twice = sorted(vectors.keys() & (extras or {}).keys())
        if twice:
            raise FormatError(folder, f"{twice[:4]} are vectors of the adapter and extras as well")
        extras = {**vectors, **(extras or {})}
    if extras:
        more, declared = extra_tensors(folder, extras, fields, table)
        tensors, common = {**tensors, **more}, {**common, **declared}
    fields, tensors = {**fields, **parameters}, {**tensors, **bare}
    if parameters and peft_parameters.FIELD not in table.fixed:
        raise FormatError(folder, f"PEFT's {table.type} has no {peft_parameters.FIELD}")
    config = peft_config.combine(folder / CONFIG, table, fields, common, set(parameters))
    if parameters:
        config[peft_parameters.FIELD] = sorted(parameters)
    if layer_replication is not None:
        if replication.FIELD not in config:
            raise FormatError(folder, f"PEFT's {table.type} has no {replication.FIELD}")
        replication.check_sites(folder, (site for site, _ in adapter.sites), layer_replication)
        config[replication.FIELD] = [list(pair) for pair in layer_replication]
    config.update(said)
    if token_ids is not None:
        if peft_tokens.FIELD not in config:
            raise FormatError(folder, f"PEFT's {table.type} has no {peft_tokens.FIELD}")
        config[peft_tokens.FIELD], tensors = token_ids, {**tensors, **rows}
    data = safetensors_file.to_bytes(folder / WEIGHTS, tensors, {"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    whole_file.write_bytes(folder / WEIGHTS, data)
    whole_file.write_bytes(folder / CONFIG, peft_config.to_bytes(config))


def load_peft(
    path: str | os.PathLike[str],
    names: NameMap,
    params_or_sites: Tree,
    *,
    layout: str | None = None,
    extras: str = "refuse",
    tables: Sequence[Table] = (),
    layer_replication: replication.Replication | None = None,
) -> Adapter:
    """Reads a directory that PEFT wrote.

    Args:
      path: the directory.
      names: from site paths to torch modules.
      params_or_sites: the sites of the model, as `jl.sites(fn, params, ...)` gives them, which know
        the layout of every weight; or its parameters, any PyTree: then the rules of `names` say
        which leaves are stacks, and `layout` how matrices lie. Leaves may be sites as well.
      layout: of the matrices among parameters: "in_out" ([*stack, in, out], Flax's kernels) or
        "out_in" (torch's weights). Required where the file adapts a square matrix of them; None:
        the
        shapes say it.
      extras: what to do with weights of the base model in the file (biases, ``modules_to_save``,
        embedding tables that PEFT saves whole): "refuse" the file, so that none is lost unnoticed;
        "leave" them to `peft_extras`; or "adapt" biases and norms, which become sites of the
        adapter
        (`BitFit`, `LNTuning`).
      tables: of methods of your own, tried before the library's.
      layer_replication: what `params_or_sites` were expanded by, see `replicate_layers`; it must be
        that of the config. None: they were not.

    Returns:
      The adapter, float arrays in the dtype of the file.

    Raises:
      FormatError: anything in the files that is not understood, damaged, missing or unexpected.
      ValueError: `names` does not fit the sites, or `extras` is another word.
    """
    if extras not in ("refuse", "leave", "adapt"):
        raise ValueError(f"{extras=}, expected 'refuse', 'leave' or 'adapt'")
    folder = Path(path)
    config, table, tensors = read_files(folder / CONFIG, folder / WEIGHTS, tables)
    config = replication.settled(folder / CONFIG, config, layer_replication)
    model = model_sites(params_or_sites, names, layout)
    modules = names.table(model.sites.values())
    model = model.with_tables(_tables(tensors, modules))
    sites = model.sites
    vectors = names.vectors(sites.values())
    if table.method is LNTuning:
        modules = {name.rpartition(".")[0]: where for name, where in vectors.items()}
    biased = peft_vectors.bias_modules(vectors) if table is BEFT_TABLE else {}
    modules = {**modules, **biased}
    rows: dict[str, Read] = {}
    if peft_tokens.FIELD in table.fixed:
        given = (folder / WEIGHTS, config, tensors, sites, modules)
        config, tensors, rows = peft_tokens.taken(*given)
    slices: peft_parameters.Slices = {}
    if table.method is LoRA and config.get(peft_parameters.FIELD):
        bare = names.parameters(sites.values())
        for one in bare:
            model.site(one.site.path)
        tensors, slices = peft_parameters.taken(folder / WEIGHTS, config, table, tensors, bare)
        config = {**config, peft_parameters.FIELD: None}
    invocation: list[int] | None = None
    if table.method is LoRA:
        config, invocation = wrapped.taken(folder / CONFIG, config)
    reader = peft_config.Reader(folder / CONFIG, config, table)
    per_module, shared, rest = by_module(tensors, table)
    try:
        per_module = fused.spread(per_module, modules)
        outputs = {name: sites[where].d_out for name, (where, _) in modules.items()}
        per_module, alphas = fused.joined(
            per_module, outputs, partial(_scale, reader), reader.targets
        )
    except ValueError as error:
        raise FormatError(folder / WEIGHTS, str(error)) from error
    check_rest(folder / WEIGHTS, reader, rest, extras, modules, sites)
    if table.regrow and not shared:
        shared = regrown(reader, table, per_module, modules, sites)
    if not per_module and not slices:
        raise FormatError(
            folder / WEIGHTS, f"no tensor of a {table.type} adapter; {keys_seen(tensors)}"
        )
    check_modules(folder / WEIGHTS, reader, per_module, shared, modules, table)
    if biased:
        own = {module: t for module, t in per_module.items() if module in biased}
        slices = peft_vectors.of_beft(folder / WEIGHTS, own, vectors, sites)
        per_module = {module: t for module, t in per_module.items() if module not in biased}
    if table.method is LNTuning:
        slices = peft_vectors.of_layers(folder / WEIGHTS, per_module, vectors, sites)
        per_module = {}
    more = related(folder / WEIGHTS, table, config, per_module, shared, modules, sites)
    for module, arrays in per_module.items():
        where, index = modules[module]
        site = model.site(where)
        try:
            check_site(table, site)
            fields = reader.fields(module)
            if module in alphas:
                rank = len(arrays[MATRIX[0]])
                fields |= {"r": rank, "lora_alpha": alphas[module], "use_rslora": False}
            base = {"base": model.matrix(where, index)} if table.weighs else {}
            known = {**arrays, **shared, **base, **more.get(module, {})}
            read = table.read(site.slice(), known, fields)
        except ValueError as error:
            raise FormatError(folder / WEIGHTS, f"{module}: {error}") from error
        check_bias(folder / WEIGHTS, table, read.method, where, model.biases)
        slices.setdefault(where, {})[index] = read
    if layer_replication is not None:
        replication.check_sites(folder, (sites[where] for where in slices), layer_replication)
    adapter = join(folder / WEIGHTS, table, sites, slices, shared)
    if invocation is not None:
        adapter = wrapped.masked(folder / CONFIG, adapter, invocation)
    if extras == "adapt" and rest:
        more = peft_vectors.of_extras(folder / WEIGHTS, rest, vectors, sites)
        adapter = peft_vectors.together(adapter, more)
    return peft_tokens.with_rows(folder / WEIGHTS, adapter, sites, rows)


def peft_extras(
    path: str | os.PathLike[str], tables: Sequence[Table] = ()
) -> dict[str, np.ndarray]:
    """Weights of the base model that an adapter's file brings along, by torch name.

    Args:
      path: the directory.
      tables: of methods of your own, tried before the library's.

    Returns:
      ``{"classifier.weight": [out, in], ...}``; empty for most adapters.

    Raises:
      FormatError: a file is missing or damaged, or no table reads it.
    """
    folder = Path(path)
    _, table, tensors = read_files(folder / CONFIG, folder / WEIGHTS, tables)
    rest = by_module(tensors, table)[2]
    rest = {key: t for key, t in rest.items() if not peft_tokens.is_token_key(key)}
    return {peft_vectors.torch_name(key): t for key, t in rest.items()}


def _beft_side(
    folder: Path, adapter: Adapter, names: NameMap
) -> tuple[Arrays, dict[str, Fields], Table]:
    """Sites of BEFT, and those of `OutputBias` where modules have no bias."""
    rest = tuple((s, m) for s, m in adapter.sites if not isinstance(m, BEFT))
    if not all(isinstance(m, OutputBias) for _, m in rest):
        raise FormatError(folder, "PEFT has no other methods next to BEFT, expected BEFT alone")
    tensors, fields, table = peft_vectors.beft_side(folder, adapter, names)
    if rest:
        more, others, _ = torch_side(folder, adapter.replace(sites=rest), names, None)
        twice = sorted(fields.keys() & others.keys())
        if twice:
            raise FormatError(folder, f"{twice[:4]} have both BEFT and OutputBias")
        tensors, fields = {**tensors, **more}, {**fields, **others}
    return tensors, fields, table


def _scale(reader: peft_config.Reader, module: str, _: Dynamic, rank: int) -> float:
    """The scale of one module of a fused site."""
    fields = reader.fields(module)
    if fields["r"] != rank:
        raise ValueError(f"{module}: {MATRIX[0]} has {rank} rows, expected {fields['r']}")
    return float(scale_of(fields["lora_alpha"], rank, fields["use_rslora"]))


def _tables(tensors: Mapping[str, Json], modules: Modules) -> set[str]:
    """The sites that the file takes for embedding tables."""
    ends = (*(f".{suffix}" for suffix in (*TABLE, ROWS)), peft_tokens.SUFFIX)
    tables = {
        key.removeprefix(ROOT).removesuffix(e) for key in tensors for e in ends if key.endswith(e)
    }
    return {modules[name][0] for name in tables if name in modules}
