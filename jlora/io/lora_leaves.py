r"""LoRA as JAX packages keep it: two more leaves for a weight, in the tree of the parameters.

========  ==================================  =================================================
package   leaves of the weight ``m/w``        scale
========  ==================================  =================================================
qwix      ``m/w_lora_a``, ``m/w_lora_b``      :math:`\alpha / r`, of the ``LoraRule`` alone: the
                                              parameters do not have it (Tunix; MaxText, which
                                              is called "maxtext" on the way back)
gemma     ``m/_LoRAEinsum_0/lora/a``, ``b``   1
flax      ``m/lora/lora_a``, ``lora_b``       1 (``nnx.LoRALinear``; ``m/lora_a`` of ``nnx.LoRA``,
                                              which is EasyDeL's: "easydel" on the way back)
keras     ``m/lora_kernel_a``, ``..._b``      1 (``backbone.enable_lora``)
========  ==================================  =================================================

The first factor has the axes that the weight shares with the inputs, then r; the second r, then the
axes of the outputs. Two packages' factors are not those of the matrix d_in x d_out:

- An axis that stacks parts (key and value of Gemma's ``kv_einsum``) is an output there: all parts
  share the first factor. Each gets a copy of it.
- Keras factors only the last axis, so that queries of N heads have a first factor per head,

  .. math:: \Delta W_{(n, h)} = \sum_r A_{n, r} B_{r, h}
      = [A_1, ..., A_N]\, (I_N \otimes B)_{\cdot, (n, h)}

  which is a LoRA of rank N r.

MaxText multiplies by flattened kernels, so its qwix leaves have one axis of inputs and one of
outputs, whatever the weight has, and scanned layers at axis 1: [d_in, L, r] and [r, L, d_out].

All are exact. `lora_leaves` goes the other way: parts with first factors of their own get one of
the joined rank, and as a package has one rank for all sites, smaller ranks are padded with zeros.

Reference: the packages' parameters: qwix 0.1.8, gemma 3.3.0, flax 0.12.8, keras 3.15.1,
    maxtext 0.2.5, easydel 0.3.0.
Deviates: nothing.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora.core.adapter import Adapter
from jlora.core.bank import one_adapter
from jlora.core.lift import flatten
from jlora.core.site import Site
from jlora.io.errors import FormatError, keys_seen
from jlora.io.names import NameMap
from jlora.io.peft.table import scale_of
from jlora.io.slices import required
from jlora.methods.low_rank.lora import LoRA
from jlora.types import Tree

Arrays = dict[str, np.ndarray]
FORMS = (  # (package, pattern of a leaf, the weights it may be of)
    ("gemma", r"(.+)/_LoRAEinsum_\d+/lora/([ab])", (r"\1/w",)),
    ("gemma", r"(.+)/_LoRAEinsum_(?P<leaf>[A-Za-z]\w*)/lora/([ab])", (r"\1/\g<leaf>",)),
    ("gemma", r"(.+)/lora/([ab])", (r"\1/kernel",)),
    ("flax", r"(.+)/lora/lora_([ab])", (r"\1/kernel",)),
    ("flax", r"(.+)/lora_([ab])", (r"\1/kernel", r"\1/base_module/kernel")),
    ("keras", r"(.+)/lora_(kernel|embeddings)_([ab])", (r"\1/\2",)),
    ("qwix", r"(.+)_lora_([ab])", (r"\1",)),
)
PACKAGES = ("qwix", "maxtext", "gemma", "flax", "easydel", "keras")
QWIX = ("qwix", "maxtext")


class Factors(NamedTuple):
    """The two leaves of a weight."""

    package: str
    leaves: dict[str, np.ndarray]  # "a", "b"


class PackageLoRA(NamedTuple):
    """An adapter as a package keeps it."""

    leaves: dict[str, np.ndarray]  # path -> array, to be put into the parameters
    rank: int  # for all sites
    alpha: float  # for qwix's `LoraRule`; rank where the scale is 1


def load_lora_leaves(params: Tree, names: NameMap, *, alpha: float | None = None) -> Adapter:
    """The LoRA that parameters of a JAX package hold.

    Args:
      params: the parameters with their LoRA leaves, or these alone where the package has not
        flattened them; a pytree, or arrays by path.
      names: of the package (`jl.io.tunix`, ...): what each axis of a weight is.
      alpha: of qwix's `LoraRule`; None for packages whose scale is 1, and only for these.

    Returns:
      The adapter: sites as `names` has them, arrays in their dtype.

    Raises:
      FormatError: no LoRA leaves, half of a pair, two packages, shapes that do not fit; an alpha
        that is missing, or given to a package without one.
      ValueError: `names` is no name map.
    """
    required(names)
    leaves = flatten(params)[0]
    pairs = _pairs(leaves, names)
    packages = sorted({f.package for f in pairs.values()})
    if len(packages) > 1:
        raise FormatError("params", f"got LoRA leaves of {packages}, expected those of one package")
    if ("qwix" in packages) != (alpha is not None):
        raise FormatError("params", f"alpha: got {alpha}, expected "
                          + ("that of qwix's LoraRule" if alpha is None else "None: the scale of "
                             f"{packages[0]} is 1"))  # fmt: skip
    trainable, frozen, sites = {}, {}, []
    for path in sorted(pairs):
        kinds = names.kinds(path) or "io"
        try:
            a, b = _stack_first(kinds, *(pairs[path].leaves[k] for k in "ab"))
            a, b = _unflattened(kinds, leaves.get(path), a, b)
            site, a, b = _canonical(path, kinds, a, b)
        except ValueError as error:
            raise FormatError(path, str(error)) from error
        own = a.shape[-1] if alpha is None else alpha
        scale = scale_of(own, a.shape[-1])
        method = LoRA(rank=a.shape[-1], alpha=int(own) if float(own).is_integer() else own)
        trainable[path] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
        frozen[path] = {"scale": jnp.full(site.stack, scale, jnp.float32)}
        sites.append((site, method))
    return Adapter(trainable, frozen, tuple(sites))


def lora_leaves(adapter: Adapter, package: str) -> PackageLoRA:
    """An adapter as the leaves of a JAX package: to go on training there, or to run it.

    Args:
      adapter: one adapter of LoRA sites that are called as the package calls its weights.
      package: "qwix" (Tunix), "maxtext", "gemma", "flax", "easydel" or "keras".

    Returns:
      The leaves, the one rank and the alpha that the package has to be given. Weights of the
      package that are no sites keep the leaves they have: second factors of zeros.

    Raises:
      ValueError: another package, another method, a bank, a site that the package would name
        otherwise; outputs of Keras's heads that have no common second factor.
    """
    if package not in PACKAGES:
        raise ValueError(f"package: got {package!r}, expected one of {PACKAGES}")
    one_adapter(adapter, "lora_leaves")
    rows = {}
    for site, method in adapter.sites:
        if not isinstance(method, LoRA):
            raise ValueError(f"{site.path}: got {type(method).__name__}, expected LoRA")
        own, _ = adapter.arrays(site)
        rows[site.path] = _leaves(site, *(np.asarray(own[k]) for k in "ab"), package)
        rows[site.path] += (np.asarray(own["scale"], np.float32),)
    rank = max(a.shape[-1] for a, _, _ in rows.values())
    scales = {float(s) for *_, scale in rows.values() for s in scale.reshape(-1)}
    common = scales.pop() if package in QWIX and len(scales) == 1 else 1.0
    leaves: Arrays = {}
    for site, _ in adapter.sites:
        a, b, scale = rows[site.path]
        b = _scaled(site, b, scale / np.float32(common))
        more = rank - a.shape[-1]
        a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)])
        b = np.pad(b, [(0, more)] + [(0, 0)] * (b.ndim - 1))
        for factor, array in {"a": a, "b": b}.items():
            leaves[_leaf(site.path, package, factor)] = array
    return PackageLoRA(leaves, rank, common * rank)


def is_leaf(path: str) -> bool:
    """Whether a path of a parameter tree is that of a LoRA leaf of a package.

    Args:
      path: with slashes.

    Returns:
      True for the forms above.
    """
    name = path.removesuffix("/value")
    return any(re.fullmatch(pattern, name) for _, pattern, _ in FORMS)


def _pairs(leaves: Mapping[str, np.ndarray], names: NameMap) -> dict[str, Factors]:
    """Weight -> its two factors, where leaves are those of LoRA."""
    pairs: dict[str, Factors] = {}
    for path, leaf in leaves.items():
        name = path.removesuffix("/value")
        for package, pattern, weights in FORMS:
            match = re.fullmatch(pattern, name)
            if match is None:
                continue
            places = [match.expand(weight) for weight in weights]
            weight = next((w for w in places if names.find(w) is not None), None)
            if weight is None:
                raise FormatError(path, f"the name map has no rule for its weight {places[0]!r}")
            weight += path.removeprefix(name)  # the /value of an NNX state
            own = pairs.setdefault(weight, Factors(package, {}))
            factor = match[match.lastindex or 0]
            if own.package != package or factor in own.leaves:
                raise FormatError(path, f"{weight!r} has factors by two names")
            own.leaves[factor] = np.asarray(leaf)
            break
    if not pairs:
        raise FormatError("params", f"no LoRA leaves; {keys_seen(leaves)}")
    for weight, own in pairs.items():
        if set(own.leaves) != {"a", "b"}:
            raise FormatError(weight, f"got lora_{''.join(own.leaves)} alone, expected a and b")
    return pairs


def _stack_first(kinds: str, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The factors of scanned layers that lie at axis 1 (MaxText), with the layers first."""
    scanned = kinds[1:2] == "s" and kinds.count("s") == 1 and a.ndim == b.ndim == 3
    if not scanned or a.shape[1] != b.shape[1] or a.shape[2] != b.shape[0]:
        return a, b
    return np.moveaxis(a, 1, 0), np.moveaxis(b, 1, 0)


def _unflattened(
    kinds: str, weight: np.ndarray | None, a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The factors with the axes of the weight, where the package has flattened them."""
    n = kinds.count("s")
    if len(kinds) == n + 2 or not a.ndim == b.ndim == n + 2 or a.shape[:n] != b.shape[:n]:
        return a, b
    if weight is None:
        raise ValueError(
            f"lora_a {a.shape} and lora_b {b.shape} are flattened; expected its weight, "
            f"axes {kinds!r}, among the parameters (`--like` of `jlora convert`)"
        )
    if len(weight.shape) != len(kinds):
        return a, b
    inputs, outputs = (
        tuple(n for n, kind in zip(weight.shape, kinds, strict=True) if kind == wanted)
        for wanted in "io"
    )
    if (a.shape[-2], b.shape[-1]) != (np.prod(inputs), np.prod(outputs)):
        return a, b
    a = a.reshape(*a.shape[:n], *inputs, a.shape[-1])
    return a, b.reshape(*b.shape[: n + 1], *outputs)


def _canonical(
    path: str, kinds: str, a: np.ndarray, b: np.ndarray
) -> tuple[Site, np.ndarray, np.ndarray]:
    """(site, a [*stack, d_in, r], b [*stack, r, d_out])."""
    n = {kind: kinds.count(kind) for kind in "sio"}
    rank = a.shape[-1] if a.ndim else 0
    sizes: dict[int, int] = {}  # axis of the weight -> its size
    of = lambda wanted: [k for k, kind in enumerate(kinds) if kind in wanted]  # noqa: E731
    if a.ndim == n["i"] + 1 and b.ndim == 1 + n["o"] + n["s"] and rank == b.shape[0]:
        sizes |= dict(zip(of("i"), a.shape[:-1], strict=True))
        sizes |= dict(zip(of("so"), b.shape[1:], strict=True))
        stack = [1 + of("so").index(k) for k in of("s")]  # its parts share the first factor
        b = np.moveaxis(b, stack, range(n["s"]))
        b = b.reshape(*b.shape[: n["s"]], rank, -1)
        a = a.reshape(-1, rank)
        a = np.broadcast_to(a, (*b.shape[: n["s"]], *a.shape))
    elif n["s"] and a.ndim == n["s"] + n["i"] + 1 and b.ndim == n["s"] + 1 + n["o"]:
        if a.shape[: n["s"]] != b.shape[: n["s"]] or rank != b.shape[n["s"]]:
            raise ValueError(f"lora_a {a.shape} and lora_b {b.shape} do not fit each other")
        sizes |= dict(zip(of("s"), a.shape, strict=False))  # a scan stacks both factors
        sizes |= dict(zip(of("i"), a.shape[n["s"] : -1], strict=True))
        sizes |= dict(zip(of("o"), b.shape[n["s"] + 1 :], strict=True))
        a = a.reshape(*a.shape[: n["s"]], -1, rank)
        b = b.reshape(*b.shape[: n["s"]], rank, -1)
    elif a.ndim == len(kinds) and kinds[-1] == "o" and b.ndim == 2 and rank == len(b):
        sizes |= dict(zip(range(a.ndim), (*a.shape[:-1], b.shape[1]), strict=True))
        inner = of("o")[:-1]  # outputs that have a first factor each: heads
        a = a.transpose(*of("s"), *of("i"), *inner, a.ndim - 1)
        heads = int(np.prod([sizes[k] for k in inner]))
        a = a.reshape(*a.shape[: n["s"]], -1, heads * rank)
        b = np.kron(np.eye(heads, dtype=b.dtype), b)
        b = np.broadcast_to(b, (*a.shape[: n["s"]], *b.shape))
    else:
        raise ValueError(
            f"lora_a {a.shape} and lora_b {b.shape} do not fit a weight with axes {kinds!r} "
            "(s stack, i in, o out)"
        )
    shape = tuple(sizes[k] for k in range(len(kinds)))
    ops = ("gather",) if path.endswith("embeddings") else ("dot",)
    return Site(path, shape, kinds, jnp.dtype(b.dtype), ops), a, b


def _leaves(
    site: Site, a: np.ndarray, b: np.ndarray, package: str
) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) with the axes of the weight, as the package has them."""
    sizes = {kind: [] for kind in "sio"}
    for size, kind in zip(site.shape, site.kinds, strict=True):
        sizes[kind].append(size)
    rank, outputs = a.shape[-1], sizes["o"]
    if package == "maxtext":
        if len(site.stack) > 1:
            raise ValueError(f"{site.path}: got stack axes {site.stack}, expected one at most")
        return np.moveaxis(a, 0, -2), np.moveaxis(b, -2, 0)
    if package == "keras" and len(outputs) > 1:
        heads, width = int(np.prod(outputs[:-1])), outputs[-1]
        second = b[: rank // heads, :width] if rank % heads == 0 else b[:0]
        if site.stack or not np.array_equal(b, np.kron(np.eye(heads, dtype=b.dtype), second)):
            raise ValueError(
                f"{site.path}: Keras has one second factor for all heads, [r, {width}]; "
                f"this one {b.shape} differs from head to head"
            )
        a = a.reshape(*sizes["i"], *outputs[:-1], len(second))
        order = [k for kind in "io" for k, c in enumerate(site.kinds[:-1]) if c == kind]
        return a.transpose(*np.argsort(order), a.ndim - 1), second
    if site.stack:  # parts with first factors of their own: the joined rank
        parts = int(np.prod(site.stack))
        a, b = a.reshape(parts, -1, rank), b.reshape(parts, rank, -1)
        if (a == a[0]).all():
            a, b = a[0], np.moveaxis(b, 0, 1)
        else:
            blocks = np.zeros((parts, rank, parts, b.shape[-1]), b.dtype)
            blocks[np.arange(parts), :, np.arange(parts)] = b
            a = np.moveaxis(a, 0, 1).reshape(a.shape[1], -1)
            b = blocks.reshape(parts * rank, parts, -1)
        b = b.reshape(len(b), *site.stack, *outputs)
        where = [k for k, kind in enumerate(c for c in site.kinds if c != "i") if kind == "s"]
        order = [k for k, kind in enumerate(c for c in site.kinds if c != "i") if kind == "o"]
        if where != list(range(len(where))) or order != list(range(len(where), b.ndim - 1)):
            raise ValueError(f"{site.path}: stack axes of {site.kinds!r} are not its first")
    return a.reshape(*sizes["i"], -1), b.reshape(len(b), *site.stack, *outputs)


def _scaled(site: Site, b: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The second factor times the scale of each part."""
    if (scale == 1).all():
        return b
    return b * scale.reshape(1, *scale.shape, *(1,) * (b.ndim - 1 - scale.ndim)).astype(b.dtype)


def _leaf(path: str, package: str, factor: str) -> str:
    name = path.removesuffix("/value")
    end = path.removeprefix(name)  # of an NNX state
    module, _, leaf = name.rpartition("/")
    if package in QWIX:
        return f"{name}_lora_{factor}{end}"
    if package == "gemma":
        inner = {"w": "_LoRAEinsum_0/", "kernel": ""}.get(leaf, f"_LoRAEinsum_{leaf}/")
        return f"{module}/{inner}lora/{factor}"
    if leaf not in ("kernel", "embeddings"):
        raise ValueError(f"{path}: {package} calls its weights kernel, got {leaf!r}")
    if package == "keras":
        return f"{module}/lora_{leaf}_{factor}"
    if package == "easydel" or module.endswith("/base_module"):
        return f"{module.removesuffix('/base_module')}/lora_{factor}{end}"
    return f"{module}/lora/lora_{factor}{end}"
