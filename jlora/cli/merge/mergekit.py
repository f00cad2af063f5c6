"""mergekit's methods as its YAML names them: parameters, defaults, inputs, and the merge of each.

=============  =================================================================================
space          what is merged: "delta", task vectors W_n - B, or "weights", the W_n themselves;
               "either": task vectors where a base is given
base           whether the base is "required", "optional" or an "input" like the others
least, most    how many models alongside the base there may be
=============  =================================================================================

A parameter is one value for the merge, or (`each`) one for every model, as there; a filter that
takes no tensor, or a level without the name, falls back to `parameters` of the whole file, and that
to the default. `docs/merging.md` says what became of every other key of mergekit.

Source: mergekit 0.1.5, the meaning of its files.
Deviates: `weight` of no model means 1/N each, where mergekit requires it; parameters that mergekit
would leave unread are errors; negative weights are refused where a sum of weights that may vanish
divides; numbers outside of their interval are errors, where mergekit takes a density above 1 as 1
and a `select_topk` of 0 as nothing kept.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jlora.cli.merge import sparsify, whole
from jlora.cli.merge.values import ConfigError, Scope, first
from jlora.types import Dynamic, Json

REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a method."""

    default: Dynamic = REQUIRED  # None: see `resolved`
    each: bool = False  # one for every model; else one for the merge
    kind: Callable[..., Dynamic] = float  # or bool, int, str
    key: str = ""  # of the function in `whole`, where it has another name; "-": none
    within: str = "(-inf, inf)"  # the interval of a number: "(" or ")" leave out its end

    def checked(self, value: Json, where: str) -> Dynamic:
        """A value of the kind that the parameter has.

        Args:
          value: as the configuration has it.
          where: its key, for the message.

        Returns:
          The value; a number as `kind` has it.

        Raises:
          ConfigError: it is of another kind, or a number outside of `within`.
        """
        if value is None and self.default is None:
            return None
        good = False
        if self.kind is bool or self.kind is str:
            good = isinstance(value, bool if self.kind is bool else str)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if not self.holds(value):  # first, as infinity is no whole number
                raise ConfigError(f"{where}: got {value!r}, expected a number in {self.within}")
            good = self.kind is float or value == int(value)
        if not good:
            kinds = {bool: "true or false", str: "text", int: "a whole number", float: "a number"}
            raise ConfigError(f"{where}: got {value!r}, expected {kinds[self.kind]}")
        return self.kind(value)

    def holds(self, value: float) -> bool:
        """Whether a number lies within the interval.

        Args:
          value: the number; NaN lies in none.

        Returns:
          True if it does.
        """
        low, high = (float(end) for end in self.within[1:-1].split(","))
        above = low <= value if self.within[0] == "[" else low < value
        return above and (value <= high if self.within[-1] == "]" else value < high)


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of mergekit."""

    name: str
    function: Callable[..., Dynamic]  # of `whole`
    parameters: Mapping[str, Parameter]
    space: str = "delta"
    base: str = "required"
    least: int = 1
    most: int | None = None
    fixed: Mapping[str, Json] = dataclasses.field(default_factory=dict)  # for the function
    random: bool = False

    @property
    def votes(self) -> bool:
        """Whether a sign is elected."""
        return "vote" in self.parameters


WEIGHT, FLAG = Parameter(None, each=True), Parameter(False, kind=bool)


def _family(
    name: str, sparsify: Dynamic = None, more: Mapping[str, Parameter] | None = None, *,
    vote: bool = False, normalize: bool = False, drops: bool = False,
) -> Method:  # fmt: skip
    """A method of generalised task arithmetic; `drops`: at random, and rescaled by default."""
    parameters = {
        "weight": WEIGHT,
        "normalize": Parameter(normalize, kind=bool),
        "lambda": Parameter(1.0, key="scale"),
        "int8_mask": Parameter(False, kind=bool, key="-"),
        **({"density": Parameter(1.0, each=True, within="(0, 1]"),
            "rescale": Parameter(drops, kind=bool)}
           if sparsify else {}),
        **({"vote": Parameter("sum", kind=str)} if vote else {}),
        **(more or {}),
    }  # fmt: skip
    return Method(name, whole.task_vectors, parameters, fixed={"sparsify": sparsify}, random=drops)


GAMMA, EPSILON = ({key: Parameter(value, each=True, within="[0, 1)")} for key, value in
                  (("gamma", 0.01), ("epsilon", 0.15)))  # fmt: skip
METHODS = {
    m.name: m
    for m in (
        _family("task_arithmetic"),
        _family("ties", sparsify.magnitude, vote=True, normalize=True),
        _family("dare_linear", sparsify.dropped, drops=True),
        _family("dare_ties", sparsify.dropped, vote=True, drops=True),
        _family("breadcrumbs", sparsify.outliers, GAMMA),
        _family("breadcrumbs_ties", sparsify.outliers, GAMMA, vote=True),
        _family("della", sparsify.magprune, EPSILON, vote=True, normalize=True, drops=True),
        _family("della_linear", sparsify.magprune, EPSILON, drops=True),
        Method("sce", whole.sce, {"select_topk": Parameter(1.0, within="(0, 1]"),
                                  "int8_mask": Parameter(False, kind=bool, key="-")}),
        Method("model_stock", whole.model_stock, {"filter_wise": FLAG}, least=2),
        Method("nearswap", whole.nearswap, {"t": Parameter()}, most=1),
        Method("linear", whole.linear, {"weight": WEIGHT, "normalize": Parameter(True, kind=bool)},
               space="weights", base="input"),
        Method("passthrough", whole.passthrough, {"scale": Parameter(None, each=True)},
               space="weights", base="input", most=1),
        Method("slerp", whole.slerp, {"t": Parameter()}, space="weights", most=1),
        Method("nuslerp", whole.nuslerp,
               {"weight": WEIGHT, "nuslerp_flatten": Parameter(True, kind=bool),
                "nuslerp_row_wise": FLAG},
               space="either", base="optional", least=2, most=2),
        Method("multislerp", whole.multislerp,
               {"weight": WEIGHT, "normalize_weights": Parameter(True, kind=bool),
                "eps": Parameter(1e-8, within="[0, inf)")},
               space="either", base="optional"),
        Method("karcher", whole.karcher,
               {"max_iter": Parameter(10, kind=int, within="[1, inf)"),
                "tol": Parameter(1e-5, within="[0, inf)")},
               space="weights", base="input"),
    )
}  # fmt: skip
ELSEWHERE = {  # names of other programs -> what to write here
    "arcee_fusion": "thresholds by the softmax of weights; ties or breadcrumbs keep large changes",
    "ram": "sums what one model changes and averages the rest; consensus and ties are near it",
    "ramplus_tl": "as ram",
    "cat": "concat is the exact weighted sum",
    "add": "concat is the exact weighted sum, of weights 1",
    "average": "concat without weights is the mean",
    "svd": "truncated is the weighted sum cut to a rank",
    "dare": "dare_linear, or with a vote dare_ties",
    "magnitude_prune": "magnitude",
    "tie": "ties",
}


def resolved(
    method: Method, shared: Sequence[Scope], each: Sequence[Sequence[Scope]], name: str,
    place: float | None,
) -> dict[str, Json]:  # fmt: skip
    """The parameters of a tensor.

    Args:
      method: the row.
      shared: the levels of parameters of the merge, the nearest first.
      each: those of every model.
      name: of the tensor; filters are parts of it.
      place: 0..1, its layer's, for gradients; None: it has no layer.

    Returns:
      Name -> value, or a tuple with one for each model.

    Raises:
      ConfigError: a required one is missing; a value of another kind; weights that cannot be used.
    """
    out: dict[str, Json] = {}
    for key, parameter in method.parameters.items():
        levels = each if parameter.each else [shared]
        values = []
        for scopes in levels:
            where, value = first(scopes, key, name, place)
            if where is None:
                where, value = f"parameters.{key}", parameter.default
            if value is REQUIRED:
                raise ConfigError(f"parameters.{key}: lacks; {method.name} needs it ({name})")
            values.append(parameter.checked(value, where))
        out[key] = tuple(values) if parameter.each else values[0]
    if "weight" in out:
        out["weight"] = _weights(method, out, name)
    return out


def call(
    method: Method, options: Mapping[str, Json], tensors: whole.Tensors, *,
    order: Callable[[np.ndarray], np.ndarray] | None = None,
    rngs: Sequence[np.random.Generator] = (),
) -> np.ndarray:  # fmt: skip
    """The merge of one tensor.

    Args:
      method: the row.
      options: its parameters, as `resolved` gives them.
      tensors: of every model, float32, of one shape.
      order: what elements are ranked by, from a task vector; None: magnitudes as they are.
      rngs: a generator per model; () for methods that are not random.

    Returns:
      The merged tensor, float32.

    Raises:
      ValueError: what the method of `whole` refuses.
    """
    own = {
        parameter.key or key: options[key]
        for key, parameter in method.parameters.items()
        if parameter.key != "-"
    }
    if order is not None:
        own["order"] = order
    if rngs:
        own["rngs"] = rngs
    return method.function(tensors, **own, **method.fixed)


def check_names(method: Method, scopes: Sequence[Scope], each: Sequence[Scope]) -> None:
    """Refuses parameters that the method lacks, or lacks at their level.

    Args:
      method: the row.
      scopes: the levels of parameters of the merge.
      each: those of every model.

    Raises:
      ConfigError: names the first of them.
    """
    for where, given in (*scopes, *each):
        for key in given:
            if key not in method.parameters:
                has = sorted(method.parameters)
                raise ConfigError(
                    f"{where}.{key}: {method.name} has no such parameter{_why(method, key)}; "
                    f"it has {has}"
                )
    for where, given in each:
        for key in given:
            if not method.parameters[key].each:
                raise ConfigError(f"{where}.{key}: one value for all models; give it under "
                                  "parameters of the whole file")  # fmt: skip


def _weights(method: Method, options: Mapping[str, Json], name: str) -> tuple[float, ...]:
    given = options["weight"]
    if all(w is None for w in given):
        return (1.0 / len(given),) * len(given)
    if any(w is None for w in given):
        k = next(k for k, w in enumerate(given) if w is None)
        raise ConfigError(f"models[{k}].parameters.weight: lacks; other models have one ({name})")
    if method.votes and options["normalize"] and min(given) < 0:
        raise ConfigError(
            f"weight: {name}: got {min(given)}; with normalize, {method.name} divides by the sum "
            "of the weights that agree, which loses the sign and may vanish: expected positive "
            "weights, or normalize: false, which keeps their sign"
        )
    divides = options.get("normalize") and method.space == "weights"
    if (divides or options.get("normalize_weights")) and sum(given) == 0:
        raise ConfigError(f"weight: {name}: they sum to 0 and cannot be normalised")
    return given


def _why(method: Method, key: str) -> str:
    if key == "weight" and method.name in ("sce", "model_stock", "karcher"):
        return " (mergekit leaves it unread there, and the models count alike)"
    if key == "weight" and method.name == "slerp":
        return " (t of the second model, from 0 to 1, is its weight)"
    if key == "density" and method.name == "task_arithmetic":
        return " (nothing is dropped; ties and dare_linear drop)"
    if key in ("scale", "normalise", "steps"):
        return f" (it is {dict(scale='lambda', normalise='normalize', steps='max_iter')[key]})"
    return ""
