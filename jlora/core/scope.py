"""What the rules know besides values: a `Scope` that does not change, and what it writes down.

A `Scope` describes one trace: the rules, the side inputs, what is allowed. Every scan body, branch
and checkpoint has one of its own, with a `Record` of its own: the reports of methods, what sites
publish for later sites, and in the abstract walk who uses which weight. JAX may trace a body more
than once, so a `Body` makes a fresh scope each time, and only the last one counts.

Reference: none.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax

from jlora.core import compat
from jlora.core.init import key_of
from jlora.core.lazy import Lazy
from jlora.types import Dynamic


class Rule(Protocol):
    """How lazy weights pass through one primitive.

    Args:
      scope: of the trace.
      eqn: the equation of the jaxpr.
      values, w, x, a, b, by, lhs, rhs, ids, value, starts, index: its operands, in its order; lazy
        weights and arrays.

    Returns:
      One value per output of the equation; lazy ones may be among them. None: the weights have to
      be merged for it.
    """

    def __call__(
        self, scope: "Scope", eqn: Dynamic, /, *values: Dynamic, **_: Dynamic
    ) -> list[Dynamic] | None: ...


@dataclasses.dataclass
class Record:
    """What happened in one scope so far."""

    uses: list[Dynamic] | None = None  # the abstract walk: who consumes what; None where values run
    fixed: dict[int, Dynamic] = dataclasses.field(
        default_factory=dict
    )  # in the walk: by id, what no
    # argument of the function has a part in (but weights may have)
    reports: dict[str, Dynamic] = dataclasses.field(default_factory=dict)  # by name, of methods
    published: dict[str, Dynamic] = dataclasses.field(
        default_factory=dict
    )  # by name, for later sites
    counts: Counter = dataclasses.field(default_factory=Counter)  # reports, uses and bodies so far

    def number(self, *what: str) -> int:
        """Counts.

        Args:
          what: names what is counted.

        Returns:
          How often `what` has occurred, this time included.
        """
        self.counts[what] += 1
        return self.counts[what]


@dataclasses.dataclass(frozen=True)
class Scope:
    """One trace, or one body of it; only its `record` changes."""

    rules: Mapping[str, Rule]  # by the name of the primitive
    ctx: Mapping[str, Dynamic]  # side inputs of the methods; `key` is folded per step and per site
    on_dense: str = "error"
    reporting: bool = False  # whether the caller wants the side outputs
    times: int = 1  # how often this scope runs
    calls_of: tuple[Dynamic, ...] = ()  # the equations whose bodies are being run, outermost first
    record: Record = dataclasses.field(default_factory=Record)

    @property
    def uses(self) -> list[Dynamic] | None:
        """Of the abstract walk; None where values run."""
        return self.record.uses

    @property
    def aux(self) -> dict[str, Dynamic]:
        """The side outputs so far."""
        return self.record.reports

    def fork(self, times: int = 1) -> "Body":
        """A body that is traced separately.

        Args:
          times: how often it runs per run of this scope; 1 for what is no loop.

        Returns:
          What makes its scopes.
        """
        scope = dataclasses.replace(self, times=self.times * times)
        return Body(scope._folded(self.record.number("body")))

    def inside(self, eqn: Dynamic) -> "Scope":
        """The same scope in the body of a call.

        Args:
          eqn: the call.

        Returns:
          A scope with the same record.
        """
        return dataclasses.replace(self, calls_of=(*self.calls_of, eqn))

    def join(self, body: "Body", aux: Mapping[str, Dynamic]) -> None:
        """Takes over what happened in a body.

        Args:
          body: of `fork`; its uses of weights are added in the abstract walk.
          aux: its reports by name, as values of this trace.
        """
        if self.record.uses is not None and body.latest is not None:
            self.record.uses.extend(body.latest.uses or ())
        for name, report in aux.items():
            self.report(name.split("#")[0], report)

    def report(self, path: str, report: Dynamic) -> None:
        """Keeps what a method reports; the second use of a site in a scope is called path#2.

        Args:
          path: of the site.
          report: a PyTree of arrays.
        """
        if self.reporting:
            n = self.record.number("report", path)
            self.record.reports[path if n == 1 else f"{path}#{n}"] = report

    @property
    def published(self) -> dict[str, Dynamic]:
        """What sites published for later ones, here and in the scopes around."""
        return self.record.published

    def publish(self, values: Mapping[str, Dynamic]) -> None:
        """Makes values visible in the ctx of later sites, in this scope and the bodies in it.

        A name that is published again has its new value from there on.

        Args:
          values: by name.

        Raises:
          ValueError: the caller's `ctx` has a value of that name.
        """
        for name in values:
            if name in self.ctx:
                raise ValueError(f"a site publishes {name!r}, which ctx has already")
        self.record.published.update(values)

    def visible(self, w: Lazy) -> dict[str, Dynamic]:
        """All side inputs of a site: those of every site, published ones, its own.

        Args:
          w: a use of the site.

        Returns:
          Values by name; the later kind replaces the earlier one.
        """
        return {**self.ctx, **self.published, **w.side()}

    def enter(self, w: Lazy) -> dict[str, Dynamic]:
        """The ctx of this use of a site.

        Args:
          w: the use.

        Returns:
          `visible(w)`, with a `key` of its own for each use.
        """
        path = w.site.path
        n = self.record.number("use", path)
        ctx = self.visible(w)
        if "key" in ctx:
            ctx["key"] = key_of(ctx["key"], f"{path}#{n}")
        return ctx

    def _folded(self, step: Dynamic) -> "Scope":
        """With a key of its own."""
        if "key" not in self.ctx:
            return self
        key = jax.random.fold_in(self.ctx["key"], step)
        return dataclasses.replace(self, ctx={**self.ctx, "key": key})

    def note(
        self, w: Lazy, op: str, kinds: Mapping[str, Sequence[int]], flops: int, refused: str = ""
    ) -> None:
        """Records a use, in the abstract walk.

        Args:
          w: the weight.
          op: what consumes it.
          kinds: the axes of `w` that are 'i' and 's'; others are 'o'.
          flops: of one run.
          refused: the operation and its line, where it needs the merged weight.
        """
        assert self.record.uses is not None
        self.record.uses.append((w, op, kinds, flops * self.times, refused))

    def is_fixed(self, value: Dynamic) -> bool:
        """Whether the abstract walk knows that a value depends on weights and constants only.

        Args:
          value: of the trace.

        Returns:
          True for lazy weights, constants, and what `keep` and `inherit` recorded.
        """
        traced = compat.is_traced(value)
        return isinstance(value, Lazy) or not traced or id(value) in self.record.fixed

    def inherit(self, values: Sequence[Dynamic], inside: Sequence[Dynamic]) -> None:
        """What is fixed outside of a body is so inside.

        Args:
          values: operands of the body.
          inside: what they are in it, in the same order.
        """
        if self.uses is not None:
            pairs = zip(values, inside, strict=True)
            self.record.fixed.update((id(i), i) for v, i in pairs if self.is_fixed(v))

    def keep(self, values: Sequence[Dynamic], out: Sequence[Dynamic]) -> None:
        """In the abstract walk: what is computed from fixed values is fixed.

        Args:
          values: operands of an equation.
          out: its outputs.
        """
        if self.uses is not None and all(self.is_fixed(v) for v in values):
            self.record.fixed.update((id(o), o) for o in out if not isinstance(o, Lazy))

    def place(self, eqn: Dynamic) -> str:
        """An operation and its line, that of the call for a function that JAX traced earlier.

        Args:
          eqn: the operation; None for a weight that the function returns.

        Returns:
          Text for an error message.
        """
        if eqn is None:
            return "returning it"
        return f"'{eqn.primitive.name}' at {compat.source(eqn, *reversed(self.calls_of))}"

    def dense(self, value: Dynamic, eqn: Dynamic = None) -> Dynamic:
        """A value, merged if it is lazy.

        Args:
          value: of the trace.
          eqn: the operation that needs it; None: the function returns it.

        Returns:
          An array; in the abstract walk the base, and the use is recorded.

        Raises:
          DenseWeightError: a weight would have to be merged, which `on_dense` does not allow.
        """
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


class Body:
    """Makes the scopes of one body, however often JAX traces it."""

    def __init__(self, scope: Scope):
        self._scope = scope
        self.latest: Scope | None = None  # the last scope made

    def child(self, step: Dynamic = None) -> Scope:
        """A fresh scope.

        Args:
          step: distinguishes the runs of the body, so that each has a key of its own; None: one
            run.

        Returns:
          The scope, with an empty record that knows what was published before.
        """
        scope = self._scope if step is None else self._scope._folded(step)
        uses = None if scope.record.uses is None else []
        published = dict(scope.record.published)
        record = Record(uses=uses, fixed=scope.record.fixed, published=published)
        self.latest = dataclasses.replace(scope, record=record)
        return self.latest


class DenseWeightError(ValueError):
    """A weight met an operation that needs it merged."""


def _way_out(w: Lazy, eqn: Dynamic) -> str:
    if eqn is not None and eqn.primitive.name == "dot_general":
        return f"use its axes as the adapter has them, '{w.site.kinds}' (s stack, i in, o out)"
    return "use it in a matmul, convolution or lookup only"
