"""Which torch module a weight of a JAX model is: regex maps between site paths and module names.

A `NameMap` maps one un-stacked weight, site path plus indices on its stack axes, to the dotted name
of a torch module. It is written in one direction only; the other one is found by listing the sites
at hand, so every regular expression will do and ambiguous maps are errors, not guesses.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

from jlora.core.site import Site

INDICES = "ijkl"
BRACKETS = re.compile(r"(.*)\[([^\[\]]+?)(\.T)?\]")
PART = re.compile(r".*\[\d+:\d+\]")
LAYERS = r"layers(?:[/_](?P<i>\d+))?/"  # a stack, or a list or keys of single layers


class HasPath(Protocol):
    """What is needed of a `jl.Site`."""

    @property
    def path(self) -> str: ...

    @property
    def stack(self) -> tuple[int, ...]: ...


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
      rules: regex on the whole site path -> template. ``\1``, ``\g<name>`` are groups of the regex;
        ``{i}``, ``{j}``, ... the indices on the first, second, ... stack axis. In models without
        stacks a group named ``i`` takes the place of the first index: ``layers_(?P<i>\d+)/...``.
        The first rule that matches wins. ``module[name]``, or ``module[name.T]``, is a parameter
        `name` of a module, see `peft_parameters` and, for vectors, `vectors`. ``module[0:8]`` is
        the first eight outputs of a module that is fused in the files, and ``q + k + v`` three
        modules of the files that are one site, see `fused`.
      prefix: put before every module name: ``"bert."`` for a `BertForSequenceClassification`.
      layer_offset: added to ``{i}``: the first layer of the adapter within the torch model, where
        the adapter is for the upper layers only.
    """

    rules: Mapping[str, str]
    prefix: str = ""
    layer_offset: int = 0

    def __post_init__(self):
        for pattern in self.rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"name map: {pattern!r} is no regular expression: {error}"
                ) from None
        if self.layer_offset < 0:
            raise ValueError(f"name map: {self.layer_offset=} is negative")

    def replace(self, **changes) -> NameMap:
        """A copy with other `prefix` or `layer_offset`."""
        return dataclasses.replace(self, **changes)

    def module(self, path: str, index: tuple[int, ...] = ()) -> str:
        """Torch module of slice `index` of the site at `path`.

        Raises:
          ValueError: no rule matches, or the template and the stack axes do not fit each other.
        """
        for pattern, template in self.rules.items():
            match = re.fullmatch(pattern, path)
            if match is None:
                continue
            indices = dict(zip(INDICES, index, strict=False))
            named = match.groupdict().get("i")
            if named is not None:
                if indices:
                    raise ValueError(f"name map: {path!r} has stack axes and a group 'i' as well")
                indices["i"] = int(named)
            if "i" in indices:
                indices["i"] += self.layer_offset
            wanted = set(re.findall(r"\{(\w+)\}", template))
            if wanted != set(indices):
                raise ValueError(
                    f"name map: template {template!r} wants {sorted(wanted)}, site {path!r} "
                    f"has {sorted(indices)}"
                )
            name = match.expand(template)
            for key, value in indices.items():
                name = name.replace(f"{{{key}}}", str(value))
            return " + ".join(self.prefix + part for part in name.split(" + "))
        raise ValueError(
            f"name map: no rule for site {path!r}; nearest: {near(path, self.rules) or 'none'}"
        )

    def stack_axes(self, path: str) -> int | None:
        """How many stack axes the site at `path` must have by its rule; None without a rule."""
        for pattern, template in self.rules.items():
            match = re.fullmatch(pattern, path)
            if match is not None:
                named = match.groupdict().get("i") is not None
                return len(set(re.findall(r"\{(\w+)\}", template))) - named
        return None

    def is_parameter(self, path: str) -> bool:
        """Whether the rule of the site at `path` names a parameter of a module."""
        rules = (t for pattern, t in self.rules.items() if re.fullmatch(pattern, path))
        template = next(rules, "")
        return BRACKETS.fullmatch(template) is not None and PART.fullmatch(template) is None

    def parameters(self, sites: Iterable[Site]) -> list[Parameter]:
        """The parameters among the sites, those of one module in the order of the rules.

        Raises:
          ValueError: more than one stack axis that the template does not name, or two parameters
            of a module by one rule, which leaves their order open.
        """
        found = []
        seen: set[tuple[str, int]] = set()
        for site in sites:
            if "i" not in site.kinds:
                continue
            order = next((k for k, p in enumerate(self.rules) if re.fullmatch(p, site.path)), None)
            if order is None or not self.is_parameter(site.path):
                continue
            named = self.stack_axes(site.path) or 0
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
                found.append((order, one))
        return [one for _, one in sorted(found, key=lambda item: item[0])]

    def vectors(self, sites: Iterable[Site]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Torch parameter -> (site path, stack index), for all slices of vectors.

        Vectors are sites without inputs (norms, biases); their rules name a parameter of a module,
        ``encoder.layer.{i}.output.LayerNorm[bias]``, which torch calls ``...LayerNorm.bias``.

        Raises:
          ValueError: two slices get one name.
        """
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for site in sites:
            if "i" in site.kinds or not self.is_parameter(site.path):
                continue
            for index in itertools.product(*map(range, site.stack)):
                name = self.vector(site.path, index)
                if name in found:
                    raise ValueError(
                        f"name map: {site.path!r}{list(index)} and {found[name][0]!r} are both "
                        f"called {name!r}"
                    )
                found[name] = (site.path, index)
        return found

    def vector(self, path: str, index: tuple[int, ...] = ()) -> str:
        """The torch parameter of slice `index` of the vector at `path`.

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
        """Module name -> (site path, stack index), for all slices of the given sites.

        Sites for which the map has no rule are left out: a model has more weights than adapters.

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


def near(word: str, words: Iterable[str], n: int = 3) -> list[str]:
    """The `n` of `words` that look most like `word`, for error messages."""
    return difflib.get_close_matches(
        word[:200], [w[:200] for w in itertools.islice(words, 2000)], n, 0.3
    )


def bert(prefix: str = "", layer_offset: int = 0) -> NameMap:
    """BERT, RoBERTa, MiniLM: `jlora.models.encoder` to transformers' `BertModel`.

    Args:
      prefix: ``"bert."`` where the torch model is a `BertFor...`.
      layer_offset: first layer of the adapter in the torch model, for adapters of upper layers.
    """
    layer = "encoder.layer.{i}"
    rules = {
        LAYERS + r"attention/(query|key|value)/kernel": layer + r".attention.self.\2",
        LAYERS + r"attention/out/kernel": layer + ".attention.output.dense",
        LAYERS + r"ffn/up/kernel": layer + ".intermediate.dense",
        LAYERS + r"ffn/down/kernel": layer + ".output.dense",
        r"embeddings/(word|position)/embedding": r"embeddings.\1_embeddings",
        r"embeddings/type/embedding": "embeddings.token_type_embeddings",
        r"pooler/kernel": "pooler.dense",
        LAYERS + r"attention/(query|key|value)/bias": layer + r".attention.self.\2[bias]",
        LAYERS + r"attention/out/bias": layer + ".attention.output.dense[bias]",
        LAYERS + r"ffn/up/bias": layer + ".intermediate.dense[bias]",
        LAYERS + r"ffn/down/bias": layer + ".output.dense[bias]",
        LAYERS + r"attention/norm/scale": layer + ".attention.output.LayerNorm[weight]",
        LAYERS + r"attention/norm/bias": layer + ".attention.output.LayerNorm[bias]",
        LAYERS + r"ffn/norm/scale": layer + ".output.LayerNorm[weight]",
        LAYERS + r"ffn/norm/bias": layer + ".output.LayerNorm[bias]",
        r"embeddings/norm/scale": "embeddings.LayerNorm[weight]",
        r"embeddings/norm/bias": "embeddings.LayerNorm[bias]",
        r"pooler/bias": "pooler.dense[bias]",
    }
    return NameMap(rules, prefix, layer_offset)


def llama(prefix: str = "model.", layer_offset: int = 0) -> NameMap:
    """Llama, Mistral, Qwen: scanned or listed layers to transformers' `LlamaForCausalLM`.

    Known site paths: ``layers/attention/{query,key,value,out}/kernel`` and
    ``layers/ffn/{gate,up,down}/kernel`` stacked on layers (or ``layers/3/..``), and the unrolled
    ``[model/]layers/3/self_attn/q_proj/kernel`` (also ``layers_3``) of Flax ports; biases and norms
    (``input_layernorm/scale`` or ``/weight``) of the same.

    Args:
      prefix: ``""`` where the torch model is a bare `LlamaModel`.
      layer_offset: as in `NameMap`.
    """
    layer, flax = "layers.{i}", r"(?:model/)?" + LAYERS
    rules = {
        LAYERS + r"attention/(q|k|v)(?:uery|ey|alue)/kernel": layer + r".self_attn.\2_proj",
        LAYERS + r"attention/out/kernel": layer + ".self_attn.o_proj",
        LAYERS + r"ffn/(gate|up|down)/kernel": layer + r".mlp.\2_proj",
        flax + r"(self_attn|mlp)/(\w+_proj)/kernel": layer + r".\2.\3",
        r"(?:model/)?embed_tokens/embedding": "embed_tokens",
        LAYERS + r"attention/(q|k|v)(?:uery|ey|alue)/bias": layer + r".self_attn.\2_proj[bias]",
        LAYERS + r"attention/out/bias": layer + ".self_attn.o_proj[bias]",
        flax + r"(self_attn|mlp)/(\w+_proj)/bias": layer + r".\2.\3[bias]",
        flax + r"(input_layernorm|post_attention_layernorm)/(?:scale|weight)": layer
        + r".\2[weight]",
        r"(?:model/)?norm/(?:scale|weight)": "norm[weight]",
    }
    return NameMap(rules, prefix, layer_offset)


def vit(prefix: str = "vit.", layer_offset: int = 0) -> NameMap:
    """ViT: scanned or listed layers to the `ViTForImageClassification` of transformers 5.

    Known site paths: those of `bert`, and the unrolled
    ``[vit/]encoder/layer/3/attention/attention/query/kernel`` of Flax ports.

    Args:
      prefix: ``""`` where the torch model is a bare `ViTModel`.
      layer_offset: as in `NameMap`.
    """
    layer = "layers.{i}"
    flax = r"(?:vit/)?encoder/layer/(?P<i>\d+)/"
    rules = {
        LAYERS + r"attention/(q|k|v)(?:uery|ey|alue)/kernel": layer + r".attention.\2_proj",
        LAYERS + r"attention/out/kernel": layer + ".attention.o_proj",
        LAYERS + r"ffn/up/kernel": layer + ".mlp.fc1",
        LAYERS + r"ffn/down/kernel": layer + ".mlp.fc2",
        flax + r"attention/attention/(q|k|v)(?:uery|ey|alue)/kernel": layer + r".attention.\2_proj",
        flax + r"attention/output/dense/kernel": layer + ".attention.o_proj",
        flax + r"intermediate/dense/kernel": layer + ".mlp.fc1",
        flax + r"output/dense/kernel": layer + ".mlp.fc2",
        **_vit_norms(layer),
    }
    return NameMap(rules, prefix, layer_offset)


def _vit_norms(layer: str) -> dict[str, str]:
    return {
        LAYERS + r"attention/norm/scale": layer + ".layernorm_before[weight]",
        LAYERS + r"attention/norm/bias": layer + ".layernorm_before[bias]",
        LAYERS + r"ffn/norm/scale": layer + ".layernorm_after[weight]",
        LAYERS + r"ffn/norm/bias": layer + ".layernorm_after[bias]",
        r"norm/scale": "layernorm[weight]",
        r"norm/bias": "layernorm[bias]",
    }


def vit4(prefix: str = "vit.", layer_offset: int = 0) -> NameMap:
    """As `vit`, with the module names of transformers 4: ``encoder.layer.3.attention...``."""
    layer = "encoder.layer.{i}"
    flax = r"(?:vit/)?encoder/layer/(?P<i>\d+)/"
    rules = {
        LAYERS + r"attention/(query|key|value)/kernel": layer + r".attention.attention.\2",
        LAYERS + r"attention/out/kernel": layer + ".attention.output.dense",
        LAYERS + r"ffn/up/kernel": layer + ".intermediate.dense",
        LAYERS + r"ffn/down/kernel": layer + ".output.dense",
        flax + r"attention/attention/(query|key|value)/kernel": layer + r".attention.attention.\2",
        flax + r"attention/output/dense/kernel": layer + ".attention.output.dense",
        flax + r"(intermediate|output)/dense/kernel": layer + r".\2.dense",
        **_vit_norms(layer),
    }
    return NameMap(rules, prefix, layer_offset)
