"""Which torch module a weight of a JAX model is: regex maps between site paths and module names.

A `NameMap` maps one un-stacked weight, site path plus indices on its stack axes, to the dotted name
of a torch module. It is written in one direction only; the other one is found by listing the sites
at hand, so every regular expression will do and ambiguous maps are errors, not guesses.

A leaf may be several torch modules: a stack of layers, whose slices have numbers, or a stack of
parts, whose slices have names (Gemma's ``kv_einsum``: ``{k_proj|v_proj}``), or both.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from jlora.core.site import Site
from jlora.io.errors import near
from jlora.io.rule import BRACKETS, INDICES, PLACE, Match, check, rule_of

PART = re.compile(r".*\[\d+:\d+\]")


class HasPath(Protocol):
    """What is needed of a `jl.Site`."""

    @property
    def path(self) -> str:
        """Of the weight in the parameters."""
        ...

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of its stack axes."""
        ...


class Parameter(NamedTuple):
    """A bare parameter of a torch module, of all experts where there are any."""

    name: str  # "model.layers.0.mlp.experts.gate_up_proj"
    module: str  # "model.layers.0.mlp.experts"
    site: Site
    experts: list[tuple[int, ...]]  # their indices in the site's stack; one, if there are none
    swapped: bool  # whether PEFT takes its inputs for outputs


@dataclasses.dataclass(frozen=True)
class NameMap:
    r"""Site paths to torch module names.

    ``NameMap({r"layers/attention/(query|key)/kernel": r"encoder.layer.{i}.attention.self.\1"})``

    Attributes:
      rules: regex on the whole site path (without the ``/value`` of an NNX state) -> template, or
        (template, kinds). ``\1``, ``\g<name>`` are groups of the regex; ``{i}``, ``{j}``, ... the
        indices on the first, second, ... stack axis. In models without stacks a group named ``i``
        takes the place of the first index: ``layers_(?P<i>\d+)/...``. ``{k_proj|v_proj}`` are the
        names of the slices of a stack axis: that of the first letter which the template lacks.
        Kinds have one letter per axis of the leaf, ``"soio"``: 's' a stack, 'i' an input, 'o' an
        output; without them stack axes come first. The first rule that matches wins.
        ``module[name]``, or ``module[name.T]``, is a parameter `name` of a module, see
        `peft_parameters` and, for vectors, `vectors`. ``module[0:8]`` is the first eight outputs of
        a module that is fused in the files, and ``q + k + v`` three modules of the files that are
        one site, see `fused`.
      prefix: put before every module name: ``"bert."`` for a `BertForSequenceClassification`.
      layer_offset: added to ``{i}``: the first layer of the adapter within the torch model, where
        the adapter is for the upper layers only.
    """

    rules: Mapping[str, str | Sequence[str]]
    prefix: str = ""
    layer_offset: int = 0

    def __post_init__(self):
        if not isinstance(self.rules, Mapping):
            raise ValueError(
                f"name map: got {str(self.rules)[:80]!r}, expected {{pattern: template}}"
            )
        for pattern, value in self.rules.items():
            check(pattern, value)
        if self.layer_offset < 0:
            raise ValueError(f"name map: {self.layer_offset=} is negative")

    def replace(self, *, prefix: str | None = None, layer_offset: int | None = None) -> NameMap:
        """Returns a copy with another `prefix` or `layer_offset`.

        Args:
          prefix: put before every module name; None: as it is.
          layer_offset: added to ``{i}``; None: as it is.
        """
        given = {"prefix": prefix, "layer_offset": layer_offset}
        changes = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(self, **changes)

    def find(self, path: str) -> Match | None:
        """Returns the first rule that matches a path, with its match; None without one.

        Args:
          path: of a site.
        """
        names = dict.fromkeys((path, path.removesuffix("/value")))
        for order, (pattern, value) in enumerate(self.rules.items()):
            for name in names:
                match = re.fullmatch(pattern, name)
                if match is not None:
                    return Match(order, rule_of(pattern, value), match)
        return None

    def module(self, path: str, index: tuple[int, ...] = ()) -> str:
        """Torch module of one slice of a site.

        Args:
          path: of the site.
          index: on its stack axes; () without a stack.

        Returns:
          The dotted name.

        Raises:
          ValueError: no rule matches, or the template and the stack axes do not fit each other.
        """
        match = self.find(path)
        if match is None:
            raise ValueError(
                f"name map: no rule for site {path!r}; nearest: {near(path, self.rules) or 'none'}"
            )
        template, axes, numbers = match.rule.template, match.axes(), match.numbers()
        if "i" in numbers and len(index) > len(axes):
            raise ValueError(f"name map: {path!r} has stack axes and a group 'i' as well")
        if len(index) != len(axes) or numbers.keys() - {*PLACE.findall(template)}:
            has = sorted({*INDICES[: len(index)], *numbers})
            raise ValueError(
                f"name map: template {template!r} wants {sorted({*axes, *numbers})}, site "
                f"{path!r} has {has}"
            )
        values = dict(numbers)
        names: dict[str, str] = {}
        for (letter, slices), at in zip(axes.items(), index, strict=True):
            if slices and at >= len(slices):
                raise ValueError(f"name map: {path!r} has a slice {at}, expected {slices}")
            if slices:
                names["|".join(slices)] = slices[at]
            else:
                values[letter] = at
        if "i" in values:
            values["i"] += self.layer_offset
        names |= {letter: str(value) for letter, value in values.items()}
        try:
            name = match.match.expand(PLACE.sub(lambda place: names[place[1]], template))
        except (re.error, IndexError) as error:
            raise ValueError(f"name map: template {template!r} of {path!r}: {error}") from error
        return " + ".join(self.prefix + part for part in name.split(" + "))

    def stack_axes(self, path: str) -> int | None:
        """Returns how many stack axes a site must have by its rule; None without a rule.

        Args:
          path: of the site.
        """
        match = self.find(path)
        return None if match is None else len(match.axes())

    def kinds(self, path: str) -> str | None:
        """Returns one letter per axis of a site's leaf; None where no rule says so.

        Args:
          path: of the site.
        """
        match = self.find(path)
        return None if match is None else match.rule.kinds

    def site(self, site: Site) -> Site:
        """A site with the stack axes of its rule, which the function may use as outputs.

        Args:
          site: as the function uses it.

        Returns:
          The site as the files have it; the same without a rule.

        Raises:
          ValueError: the rule has another layout, or names another number of slices.
        """
        match = self.find(site.path)
        if match is None:
            return site
        axes, kinds = match.axes(), match.rule.kinds
        if kinds is None and not any(axes.values()):
            return site
        if kinds is None:
            n = len(axes)
            kinds = "s" * n + site.kinds[n:]
        fits = len(kinds) == len(site.kinds) and all(
            said == seen or (said, seen) == ("s", "o")
            for said, seen in zip(kinds, site.kinds, strict=True)
        )
        if not fits or ("i" not in site.kinds and kinds.strip("so")):
            raise ValueError(
                f"name map: {site.path!r} {site.shape} has axes {kinds!r} by its rule, "
                f"{site.kinds!r} by its use (s stack, i in, o out)"
            )
        renamed = dataclasses.replace(site, kinds=kinds)
        for slices, size in zip(axes.values(), renamed.stack, strict=False):
            if slices and len(slices) != size:
                raise ValueError(
                    f"name map: {site.path!r} {site.shape} has {size} slices, the rule names "
                    f"{list(slices)}"
                )
        return renamed

    def is_parameter(self, path: str) -> bool:
        """Returns whether a site's rule names a parameter of a module (not a part of a fused one).

        Args:
          path: of the site.
        """
        match = self.find(path)
        template = "" if match is None else match.rule.template
        return BRACKETS.fullmatch(template) is not None and PART.fullmatch(template) is None

    def parameters(self, sites: Iterable[Site]) -> list[Parameter]:
        """The parameters among the sites, those of one module in the order of the rules.

        Args:
          sites: of the model; vectors and those of other rules are skipped.

        Returns:
          One `Parameter` per parameter of a module.

        Raises:
          ValueError: more than one stack axis that the template does not name, or two parameters
            of a module by one rule, which leaves their order open.
        """
        matches = []
        seen: set[tuple[str, int]] = set()
        for site in sites:
            if "i" not in site.kinds:
                continue
            rule = self.find(site.path)
            if rule is None or not self.is_parameter(site.path):
                continue
            order, named = rule.order, len(rule.axes())
            if len(site.stack) - named not in (0, 1):
                raise ValueError(f"name map: {site.path!r} has stack {site.stack}, names {named}")
            for index in itertools.product(*map(range, site.stack[:named])):
                match = BRACKETS.fullmatch(self.module(site.path, index))
                assert match is not None
                module, name, turned = match.groups()
                if (module, order) in seen:
                    raise ValueError(
                        f"name map: the parameters of {module!r} need a rule each, in their order "
                        f"in the module; got one for {site.path!r} and others"
                    )
                seen.add((module, order))
                experts = itertools.product(*map(range, site.stack[named:]))
                slices = [(*index, *e) for e in experts]
                one = Parameter(f"{module}.{name}", module, site, slices, turned is not None)
                matches.append((order, one))
        return [one for _, one in sorted(matches, key=lambda item: item[0])]

    def vectors(self, sites: Iterable[Site]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The torch parameters of all slices of vectors.

        Vectors are sites without inputs (norms, biases); their rules name a parameter of a module,
        ``encoder.layer.{i}.output.LayerNorm[bias]``, which torch calls ``...LayerNorm.bias``.

        Args:
          sites: of the model; those with inputs are skipped.

        Returns:
          Torch parameter -> (site path, stack index).

        Raises:
          ValueError: two slices get one name.
        """
        by_module: dict[str, tuple[str, tuple[int, ...]]] = {}
        for site in sites:
            if "i" in site.kinds or not self.is_parameter(site.path):
                continue
            for index in itertools.product(*map(range, site.stack)):
                name = self.vector(site.path, index)
                if name in by_module:
                    raise ValueError(
                        f"name map: {site.path!r}{list(index)} and {by_module[name][0]!r} are both "
                        f"called {name!r}"
                    )
                by_module[name] = (site.path, index)
        return by_module

    def vector(self, path: str, index: tuple[int, ...] = ()) -> str:
        """The torch parameter of one slice of a vector.

        Args:
          path: of the vector.
          index: on its stack axes; () without a stack.

        Returns:
          The dotted name.

        Raises:
          ValueError: its rule names no parameter of a module.
        """
        match = BRACKETS.fullmatch(self.module(path, index))
        if match is None or match[3]:
            raise ValueError(
                f"name map: {path!r} is a vector, which is a parameter of a torch module; got "
                f"{self.module(path, index)!r}, expected such as 'module[weight]'"
            )
        return f"{match[1]}.{match[2]}"

    def table(self, sites: Iterable[HasPath]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The torch modules of all slices of sites.

        Sites for which the map has no rule are left out: a model has more weights than adapters.

        Args:
          sites: of the model.

        Returns:
          Module name -> (site path, stack index).

        Raises:
          ValueError: two slices get one module name.
        """
        modules: dict[str, tuple[str, tuple[int, ...]]] = {}
        for site in sites:
            if self.stack_axes(site.path) is None or self.is_parameter(site.path):
                continue
            for index in itertools.product(*map(range, site.stack)):
                name = self.module(site.path, index)
                if name in modules:
                    raise ValueError(
                        f"name map: {site.path!r}{list(index)} and {modules[name][0]!r}"
                        f"{list(modules[name][1])} are both called {name!r}"
                    )
                modules[name] = (site.path, index)
        return modules
