"""The evaluator: a jaxpr run on values of which some are lazy weights.

Equations that touch no lazy weight are bound as they are. The others go to the rule of their
primitive; where there is none, or it declines, the weight would have to be merged.

Source: our reading (an evaluator of jaxprs, as JAX's documentation describes it).
Deviates: nothing.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jlora.core import compat
from jlora.core.init import key_of
from jlora.core.lazy import Lazy
from jlora.core.site import Site


class DenseWeightError(ValueError):
    """A weight met an operation that needs it merged."""


@dataclasses.dataclass
class Scope:
    """What one trace knows besides values; every scan body, branch, ... has its own."""

    rules: Mapping[str, Any]  # primitive -> rule
    ctx: Mapping[str, Any]  # side inputs of the methods; `key` is folded a step and a site
    on_dense: str = "error"
    reporting: bool = False  # whether the caller wants the side outputs
    uses: list | None = None  # where the abstract walk writes down who consumes what
    times: int = 1  # how often this scope runs
    fixed: dict[int, Any] = dataclasses.field(default_factory=dict)  # there too: by id, what no
    # argument of the function has a part in (but weights may have)
    calls_of: tuple[Any, ...] = ()  # the equations whose bodies are being run, outermost first
    aux: dict[str, Any] = dataclasses.field(default_factory=dict)  # side outputs
    calls: dict[str, int] = dataclasses.field(default_factory=dict)  # reports so far, by path
    turns: dict[str, int] = dataclasses.field(default_factory=dict)  # uses so far, by path
    forks: int = 0  # bodies so far
    latest: "Scope | None" = None  # of a template: the last scope made from it

    def fork(self, times: int = 1) -> "Scope":
        """A template for the scopes of a body that is traced apart and runs `times` times."""
        self.forks += 1
        ctx = dict(self.ctx)
        if "key" in ctx:
            ctx["key"] = jax.random.fold_in(ctx["key"], self.forks)
        return dataclasses.replace(self, ctx=ctx, times=self.times * times, forks=0)

    def child(self, step: Any = None) -> "Scope":
        """A fresh scope of a template, however often JAX traces it; `step` tells runs apart."""
        ctx = dict(self.ctx)
        if step is not None and "key" in ctx:
            ctx["key"] = jax.random.fold_in(ctx["key"], step)
        uses = None if self.uses is None else []
        self.latest = dataclasses.replace(
            self, ctx=ctx, uses=uses, aux={}, calls={}, turns={}, forks=0
        )
        return self.latest

    def join(self, template: "Scope", aux: Mapping[str, Any]) -> None:
        """Takes over what a body noted and, as values of this trace, reported."""
        if self.uses is not None and template.latest is not None:
            self.uses.extend(template.latest.uses or ())
        for name, report in aux.items():
            self.report(name.split("#")[0], report)

    def report(self, path: str, report: Any) -> None:
        """What a method tells; the second use of a site in a scope is called path#2."""
        if self.reporting:
            n = self.calls[path] = self.calls.get(path, 0) + 1
            self.aux[path if n == 1 else f"{path}#{n}"] = report

    def enter(self, site: Site) -> dict[str, Any]:
        """The ctx of this use of a site."""
        n = self.turns[site.path] = self.turns.get(site.path, 0) + 1
        ctx = dict(self.ctx)
        if "key" in ctx:
            ctx["key"] = key_of(ctx["key"], f"{site.path}#{n}")
        return ctx

    def note(
        self, w: Lazy, op: str, kinds: Mapping[str, Sequence[int]], flops: int, refused: str = ""
    ) -> None:
        """A use, in the abstract walk: the axes of `w` that are 'i' and 's'; others are 'o'.

        `refused`: the operation and its line, where it needs the merged weight.
        """
        assert self.uses is not None
        self.uses.append((w, op, kinds, flops * self.times, refused))

    def is_fixed(self, value: Any) -> bool:
        """Whether the abstract walk knows that a value depends on weights and constants only."""
        traced = compat.is_traced(value)
        return isinstance(value, Lazy) or not traced or id(value) in self.fixed

    def inherit(self, values: Sequence[Any], inside: Sequence[Any]) -> None:
        """What is fixed outside of a body is so inside."""
        if self.uses is not None:
            pairs = zip(values, inside, strict=True)
            self.fixed.update((id(i), i) for v, i in pairs if self.is_fixed(v))

    def keep(self, values: Sequence[Any], out: Sequence[Any]) -> None:
        if all(self.is_fixed(v) for v in values):
            self.fixed.update((id(o), o) for o in out if not isinstance(o, Lazy))

    def place(self, eqn: Any) -> str:
        """An operation and its line, that of the call for a function that JAX traced earlier."""
        if eqn is None:
            return "returning it"
        return f"'{eqn.primitive.name}' at {compat.source(eqn, *reversed(self.calls_of))}"

    def dense(self, value: Any, eqn: Any = None) -> Any:
        """`value`, merged if it is lazy; an error unless that is allowed or costs nothing."""
        if not isinstance(value, Lazy):
            return value
        if self.uses is not None:
            op = eqn.primitive.name if eqn else "return"
            op = "gather of entries" if op == "gather" else op
            self.note(value, op, {}, 0, self.place(eqn))
            return value.view()
        cheap = value.method is None or "i" not in value.site.kinds
        if not cheap and self.on_dense != "merge":
            what = self.place(eqn)
            raise DenseWeightError(
                f"{value.site.path} {value.site.shape}: {what} needs the merged weight "
                f"{value.shape}; {_way_out(value, eqn)}, leave it out of the adapter, or allow it "
                "with lift(fn, on_dense='merge')"
            )
        return value.merged()


def _way_out(w: Lazy, eqn: Any) -> str:
    if eqn is not None and eqn.primitive.name == "dot_general":
        return f"use its axes as the adapter has them, '{w.site.kinds}' (s stack, i in, o out)"
    return "use it in a matmul, convolution or lookup only"


def evaluate(scope: Scope, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    """The outputs of a jaxpr on values of which some are lazy; lazy ones may come out."""
    jaxpr, consts = compat.opened(jaxpr)
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom):
        return atom.val if compat.is_literal(atom) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        with compat.located(eqn):
            out = None
            if any(isinstance(v, Lazy) for v in values):
                rule = scope.rules.get(eqn.primitive.name)
                out = rule(scope, eqn, *values) if rule else None
                if out is None and scope.uses is not None:
                    out = scope.rules["any other"](scope, eqn, *values)
            if out is None:
                out = compat.bind(eqn, [scope.dense(v, eqn) for v in values])
            if scope.uses is not None:
                scope.keep(values, out)
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.outvars]
