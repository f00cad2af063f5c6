"""The adapter of a run: a method by its name, fresh or continued from files."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
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
    """The method that the settings name: "LoRA", or one inside of wrappers, "Decomposed(LoKr)".

    `rank`, `alpha` and `method_args` are those of the innermost method; a wrapper's own
    hyper-parameters are in `method_args` under its name.

    Args:
      settings: of the run.

    Raises:
      ValueError: no such method, or hyper-parameters that it does not have or refuses.
    """
    try:
        given = json.loads(settings.method_args)
    except (ValueError, RecursionError) as error:
        raise wrong("method_args", settings.method_args, f"JSON ({error})") from error
    *outer, inner = _kinds(settings.method)
    if not isinstance(given, dict):
        expected = f"a JSON object of {_names(inner)}"
        raise wrong("method_args", settings.method_args, expected)
    plain = {name: getattr(settings, name) for name in ("rank", "alpha")}
    plain = {name: value for name, value in plain.items() if value}
    for name, value in plain.items():
        if name not in _names(inner):
            raise wrong(name, value, f"0: {inner.__name__} has {_names(inner)}")
    own = {kind.__name__: given.pop(kind.__name__, {}) for kind in outer}
    free = [name for name in _names(inner) if name not in plain]
    built = _built(inner, plain, given, [*free, *own])
    for kind in reversed(outer):
        built = _built(kind, {"method": built}, own[kind.__name__], _names(kind))
    return built


def _kinds(text: str) -> list[type[jl.Method]]:
    """The classes of "Outer(Inner)", the innermost last."""
    known = {
        name.lower(): kind
        for name, kind in vars(methods).items()
        if isinstance(kind, type) and issubclass(kind, jl.Method)
    }
    words = re.fullmatch(r"((?:\w+\()*)(\w+)(\)*)", text.strip())
    names = re.findall(r"\w+", text) if words and words[1].count("(") == len(words[3]) else [""]
    resolved = [known.get(name.lower()) for name in names]
    kinds = [kind for kind in resolved if kind is not None]
    wrap = [issubclass(kind, jl.Wrapper) for kind in kinds]
    if len(kinds) < len(names) or not all(wrap[:-1]) or wrap[-1]:
        plain = sorted(k.__name__ for k in known.values() if not issubclass(k, jl.Wrapper))
        around = sorted(k.__name__ for k in known.values() if issubclass(k, jl.Wrapper))
        around = ", ".join(f"{name}(METHOD)" for name in around)
        raise wrong("method", text, f"one of {', '.join(plain)}; or a METHOD of them in {around}")
    return kinds


def _names(kind: type[jl.Method]) -> list[str]:
    """The hyper-parameters of a method, without the method inside of a wrapper."""
    inside = {"method"} if issubclass(kind, jl.Wrapper) else set()
    return sorted({field.name for field in dataclasses.fields(cast(Any, kind))} - inside)


def _built(kind: type[jl.Method], fixed: dict[str, Any], more: Any, names: list[str]) -> jl.Method:
    """A method of a class, its other hyper-parameters checked by name."""
    if not isinstance(more, dict) or not more.keys() <= set(names):
        expected = f"{kind.__name__}: a JSON object of {names}"
        raise wrong("method_args", json.dumps(more), expected)
    try:
        return kind(**fixed, **more)
    except (TypeError, ValueError) as error:
        raise ValueError(f"method: {kind.__name__}: {error}") from error


def check(dense: Any, config: decoder.DecoderConfig, settings: Settings) -> None:
    """Refuses a method that cannot be trained here, by shapes alone.

    Args:
      dense: shapes of the prepared parameters.
      config: the architecture.
      settings: of the run.

    Raises:
      ValueError: the method fits no site, or needs side inputs that a training step does not have.
    """
    chosen, ids = method(settings), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    start = functools.partial(fresh, config=config, settings=settings)

    def one(key: jax.Array, params: Any, ids: jax.Array) -> Any:
        tuned = jl.lift(forward(config, settings))
        return tuned(params, start(key, params), ids, ctx={"key": key}).logits

    try:
        jax.eval_shape(one, jax.random.key(0), dense, ids)
    except (TypeError, ValueError) as error:
        raise ValueError(f"method: {chosen}: {error}") from error


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

    def own(t: jax.Array) -> jax.Array:  # a frozen copy of a trained array is a buffer of its own
        return jnp.array(t, jnp.float32 if jnp.issubdtype(t.dtype, jnp.floating) else t.dtype)

    return jax.tree.map(own, adapter)


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
    loaded = jl.io.load_peft(folder, jl.io.llama(), sites)
    for part in ("trainable", "frozen"):
        theirs, ours = getattr(loaded, part), getattr(like, part)
        shapes = [jax.tree.map(lambda t: tuple(t.shape), tree) for tree in (theirs, ours)]
        if shapes[0] != shapes[1]:
            place = next(
                k for k in {**shapes[0], **shapes[1]} if shapes[0].get(k) != shapes[1].get(k)
            )
            raise ValueError(
                f"{folder}: {place}: got {shapes[0].get(place)}, expected {shapes[1].get(place)}"
            )
    return jax.tree.map(
        lambda t, o: jnp.asarray(t, o.dtype), loaded.replace(sites=like.sites), like
    )


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
