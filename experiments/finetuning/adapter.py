"""The adapter of a run: a method by its name, fresh or continued from files."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp

import jlora as jl
from experiments.config import wrong
from experiments.finetuning.settings import Settings
from jlora import methods
from jlora.io.json_file import read_json
from jlora.models import decoder


def method(settings: Settings) -> jl.Method:
    """The method that the settings name.

    Args:
      settings: of the run.

    Raises:
      ValueError: no such method, or hyper-parameters that it does not have or refuses.
    """
    known = {
        name.lower(): kind
        for name, kind in vars(methods).items()
        if isinstance(kind, type) and issubclass(kind, jl.Method)
    }
    kind = known.get(settings.method.lower())
    if kind is None or issubclass(kind, jl.Wrapper):
        names = sorted(k.__name__ for k in known.values() if not issubclass(k, jl.Wrapper))
        raise wrong("method", settings.method, f"one of {', '.join(names)}")
    fields = {field.name for field in dataclasses.fields(kind)}
    given: dict[str, Any] = {n: getattr(settings, n) for n in ("rank", "alpha")}
    given = {name: value for name, value in given.items() if value}
    for name, value in given.items():
        if name not in fields:
            raise wrong(name, value, f"0: {kind.__name__} has {sorted(fields)}")
    try:
        more = json.loads(settings.method_args)
    except (ValueError, RecursionError) as error:
        raise wrong("method_args", settings.method_args, f"JSON ({error})") from error
    if not isinstance(more, dict) or not more.keys() <= fields - given.keys():
        expected = f"a JSON object of {sorted(fields - given.keys())}"
        raise wrong("method_args", settings.method_args, expected)
    try:
        return kind(**given, **more)
    except (TypeError, ValueError) as error:
        raise ValueError(f"method: {kind.__name__}: {error}") from error


def forward(config: decoder.DecoderConfig, settings: Settings) -> Any:
    """The decoder of training, ``f(params, ids, positions, segments)``."""
    return functools.partial(decoder.forward, config=config, remat=cast(Any, settings.remat))


def fresh(key: jax.Array, params: Any, config: decoder.DecoderConfig, settings: Settings) -> Any:
    """A new adapter, float32.

    Args:
      key: of its random numbers.
      params: the prepared parameters; under `jax.eval_shape`, their shapes.
      config: the architecture.
      settings: of the run.

    Raises:
      ValueError: `targets` matches no site, or the method does not fit one.
    """
    ids = jnp.zeros((1, 2), jnp.int32)
    adapter = jl.init(
        key, forward(config, settings), params, ids, methods={settings.targets: method(settings)}
    )
    wide = lambda t: t.astype(jnp.float32) if jnp.issubdtype(t.dtype, jnp.floating) else t  # noqa: E731
    return jax.tree.map(wide, adapter)


def continued(like: Any, params: Any, name: str, settings: Settings) -> Any:
    """The adapter of `settings.start`, which must be one of this base and of `like`'s form.

    Args:
      like: a fresh adapter.
      params: the prepared parameters.
      name: base_model_name_or_path of this run.
      settings: of the run.

    Raises:
      ValueError: it is of another base, or has other sites, another method or other shapes.
    """
    folder = Path(settings.start)
    if not (folder / "adapter_config.json").is_file():
        return jl.io.restore_adapter(folder, like=like)
    given = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if given != name:
        raise ValueError(
            f"{folder}: base_model_name_or_path: got {given!r}, expected {name!r}: an adapter of"
            " another base (--base_name says what this base is called)"
        )
    sites = {site.path: site for site, _ in like.sites}
    found = jl.io.load_peft(folder, jl.io.llama(), sites)
    for part in ("trainable", "frozen"):
        theirs, ours = getattr(found, part), getattr(like, part)
        shapes = [jax.tree.map(lambda t: tuple(t.shape), tree) for tree in (theirs, ours)]
        if shapes[0] != shapes[1]:
            place = next(
                k for k in {**shapes[0], **shapes[1]} if shapes[0].get(k) != shapes[1].get(k)
            )
            raise ValueError(
                f"{folder}: {place}: got {shapes[0].get(place)}, expected {shapes[1].get(place)}"
            )
    return jax.tree.map(lambda t, o: jnp.asarray(t, o.dtype), found.replace(sites=like.sites), like)


def check_peft(adapter: Any, params: Any) -> None:
    """Raises ValueError now, not after training, where PEFT has no file for such an adapter."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            jl.io.save_peft(folder, adapter, jl.io.llama(), params=params)
        except (ValueError, NotImplementedError) as error:
            text = str(error).replace(folder, "PEFT")
            raise ValueError(
                f"peft: {text} (--nopeft writes the Orbax checkpoint alone)"
            ) from error
