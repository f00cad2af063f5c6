"""mergekit's methods on adapters that stay adapters: its parameters as those of `jlora.merging`.

The merges of `jlora.merging` take the deltas of adapters and give factors. What mergekit does to
task vectors they do to deltas; what it does to whole weights has no adapter for a result, and is
refused, or has a name of its own here: `slerp` of two adapters, `karcher` with `space: delta`.

Source: mergekit 0.1.5, the meaning of its files.
Deviates: `rank` is that of the result; DARE and DELLA divide by the probability that an element is
kept, which is mergekit's `rescale` in expectation.
"""

import dataclasses
import inspect
import sys
from collections.abc import Mapping

from jlora.cli.merge import mergekit
from jlora.cli.merge.config import Config
from jlora.cli.merge.mergekit import WEIGHT, Method, Parameter
from jlora.cli.merge.values import ConfigError
from jlora.io.errors import near
from jlora.merging.engine.table import METHODS, Merging
from jlora.types import Json

RANK = {"rank": Parameter(None, kind=int)}
OWN = {  # parameters instead of mergekit's
    "slerp": {"t": Parameter(None), "weight": WEIGHT, "axis": Parameter("out", kind=str)},
    "karcher": {
        "space": Parameter("weights", kind=str),
        "weight": WEIGHT,
        "max_iter": Parameter(10, kind=int),
    },
}
SAME = {"linear": "concat", "passthrough": "concat"}  # methods of a single sum
SPELT = ("normalize", "normalise")  # of `jlora.merging`


def row_of(name: str) -> Merging:
    """The row of `jlora.merging` that merges adapters by a method.

    Args:
      name: of the method, as a configuration has it.

    Returns:
      The row.

    Raises:
      ConfigError: an unknown method; the message names what is near it.
    """
    if name in mergekit.METHODS or name in METHODS:
        return METHODS.get(SAME.get(name, name), METHODS["concat"])
    every = sorted({*METHODS, *mergekit.METHODS})
    hint = mergekit.ELSEWHERE.get(name)
    nearest = near(name, every)
    hint = f"; instead: {hint}" if hint else f"; nearest: {nearest}" if nearest else ""
    raise ConfigError(f"merge_method: got {name!r}{hint}; expected one of {every}")


def of_adapters(method: Method, config: Config) -> bool:
    """Whether a merge is one of deltas by its own meaning here, in any format.

    Args:
      method: of mergekit.
      config: of the merge.

    Returns:
      True for `slerp` of two adapters, and with `space: delta`.
    """
    if method.name == "slerp":
        return len(config.models) == 2
    return config.parameters.get("space") == "delta"


def method_of(name: str) -> Method | None:
    """A method of mergekit with the parameters that it has for adapters.

    Args:
      name: of the method, as a configuration has it.

    Returns:
      The method; None if it is not mergekit's.

    Raises:
      ConfigError: as `row_of`.
    """
    method = mergekit.METHODS.get(name)
    if method is None:
        return None
    parameters = dict(OWN.get(name, method.parameters))
    if "rank" in options_of(row_of(name)):
        parameters |= RANK
    return dataclasses.replace(method, parameters=parameters)


def options_of(row: Merging) -> dict[str, Json]:
    """The options of a merge.

    Args:
      row: of `jlora.merging`.

    Returns:
      Name -> default, or `inspect.Parameter.empty`.
    """
    functions = [row.function]
    module = sys.modules[row.function.__module__]
    functions += filter(None, [getattr(module, f"{row.function.__name__}_rule", None)])
    options = {}
    for function in functions:
        for p in list(inspect.signature(function).parameters.values())[2:]:
            if p.kind is p.KEYWORD_ONLY and p.name not in ("key", "keys", "ids", "solver", "block"):
                options[p.name] = p.default
    return options


def check_names(row: Merging, where: str, given: Mapping[str, Json]) -> None:
    """Refuses options that a method of `jlora.merging` lacks.

    Args:
      row: of `jlora.merging`.
      where: the key under which they stand, for the message.
      given: name -> value.

    Raises:
      ConfigError: names the first of them.
    """
    known = sorted({*options_of(row), "weight", "normalize"})
    for key in given:
        if key not in known:
            raise ConfigError(f"{where}.{key}: {row.name} has no such option; it has {known}")


def translated(
    method: Method, row: Merging, options: Mapping[str, Json], number: int, site: str
) -> tuple[tuple[float, ...], dict[str, Json]]:
    """mergekit's parameters at a site, as those of `jlora.merging`.

    Args:
      method: of mergekit.
      row: of `jlora.merging`.
      options: of the site, resolved.
      number: how many adapters there are.
      site: its path, for messages.

    Returns:
      (one weight per adapter, options of the row).

    Raises:
      ConfigError: what has no adapter for a result.
    """
    if method.name == "passthrough" and number != 1:
        raise ConfigError(f"models: got {number}, expected 1: passthrough keeps one adapter as it "
                          "is; concat is the weighted sum of several")  # fmt: skip
    o = dict(options)
    weight = o.pop("weight", None) or (1.0 / number,) * number
    o.pop("int8_mask", None)
    if method.function is mergekit.whole.task_vectors:
        return _family(method, row, o, weight, site)
    if method.name in ("linear", "passthrough"):
        return _sum(method, o, weight, site), {}
    if method.name == "slerp":
        t = o.pop("t")
        return (weight if t is None else (1.0 - t, t)), o
    if method.name == "nuslerp":
        axis = "in" if o["nuslerp_row_wise"] else "out"
        return weight, {"axis": "flat" if o["nuslerp_flatten"] else axis}
    if method.name == "multislerp":
        if not o["normalize_weights"]:
            raise ConfigError(f"parameters.normalize_weights: {site}: got false, expected true: "
                              f"{_merged(method)}")  # fmt: skip
        return weight, {}
    if method.name == "sce":
        return weight, {"density": o["select_topk"]} | _rank(o)
    if method.name == "model_stock":
        return weight, {"outputs": o["filter_wise"]}
    if method.name == "karcher" and o["space"] == "delta":
        return weight, {"steps": o["max_iter"]}
    if method.name == "karcher":
        raise ConfigError(
            "merge_method: karcher is the mean of whole weights in mergekit, which is no adapter: "
            "expected out.format merged, or parameters.space: delta for the mean of the adapters"
        )
    raise ConfigError(f"merge_method: {method.name}: no adapter is its result; {_merged(method)}")


def _family(
    method: Method, row: Merging, o: dict[str, Json], weight: tuple[float, ...], site: str
) -> tuple[tuple[float, ...], dict[str, Json]]:
    known = options_of(row)
    normalize = o.pop("normalize")
    out = {"scale": o.pop("lambda")} | _rank(o)
    if o.pop("rescale", None) not in (None, "dare" in method.name or "della" in method.name):
        raise ConfigError(f"parameters.rescale: {site}: of adapters expected its default: "
                          f"{_merged(method)}")  # fmt: skip
    if method.votes:
        out[next(key for key in SPELT if key in known)] = normalize
        out["vote"] = o.pop("vote")
    elif normalize and abs(sum(weight)) >= 1e-8:
        weight = tuple(w / sum(weight) for w in weight)
    for key in ("density", "gamma", "epsilon"):
        if key in o:
            values = o.pop(key)
            one = len(set(values)) == 1
            if not one and (key != "density" or "della" in method.name):
                raise ConfigError(f"parameters.{key}: {site}: got {values}, of adapters expected "
                                  f"one for all models: {_merged(method)}")  # fmt: skip
            out[key] = values[0] if one else values
    return weight, out


def _sum(
    method: Method, o: dict[str, Json], weight: tuple[float, ...], site: str
) -> tuple[float, ...]:
    total = sum(weight)
    if method.name == "linear" and o["normalize"]:
        return tuple(w / total for w in weight)
    if method.name == "passthrough":
        total = 1.0 if o["scale"][0] is None else o["scale"][0]
    if abs(total - 1.0) > 1e-6:
        raise ConfigError(
            f"weight: {site}: the sum is {total}, which multiplies the base as well, and is no "
            f"adapter: expected 1, or concat; {_merged(method)}"
        )
    return weight


def _rank(o: dict[str, Json]) -> dict[str, Json]:
    rank = o.pop("rank", None)
    return {} if rank is None else {"rank": rank}


def _merged(method: Method) -> str:
    return f"out.format merged gives {method.name} as mergekit has it"
