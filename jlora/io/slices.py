r"""One leaf as a stack of modules, where an adapter has it as one matrix.

A function may use all parts of a leaf at once, such as Gemma's ``kv_einsum`` [2, K, D, H] in one
einsum: `jl.init` then gives it one adapter whose outputs are those of both parts. In the files, and
for a name map that calls that axis a stack, each part is a module. Outputs o of part c are

.. math:: (W + s A B)_{:, (c, o)} = W_{c, o} + s A\, B_{:, (c, o)}

so that each part has the first factor whole and its own columns of the second one; magnitudes and
vectors per output are cut likewise. The result is the same function, exactly. The copies of A are
then parameters of their own, as in an adapter that was trained with two modules.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jlora.core.adapter import Adapter
from jlora.core.site import Site
from jlora.io.names import NameMap
from jlora.methods.decomposed.dora import DoRA
from jlora.methods.low_rank.hira import HiRA
from jlora.methods.low_rank.loha import LoHa
from jlora.methods.low_rank.lora import LoRA
from jlora.methods.selective.bitfit import BitFit
from jlora.methods.selective.ln_tuning import LNTuning

METHODS = (LoRA, DoRA, HiRA, LoHa, BitFit, LNTuning)  # whose outputs do not mix
BY_OUTPUT = {"b", "b1", "b2", "m", "v"}  # arrays whose last axis is the outputs
COMMON = {"a", "a1", "a2", "scale"}  # arrays that all outputs share


def required(names: NameMap) -> NameMap:
    """Checks what a reader or a writer was given.

    Args:
      names: the name map.

    Returns:
      The same.

    Raises:
      ValueError: a bare dictionary, a preset that was not called, None.
    """
    if isinstance(names, NameMap):
        return names
    hint = "call the preset" if callable(names) else "jl.io.NameMap({pattern: template})"
    raise ValueError(f"names: got {type(names).__name__}, expected a NameMap: {hint}")


def sliced(adapter: Adapter, names: NameMap) -> Adapter:
    """`adapter` with the stack axes that a name map gives its sites.

    Args:
      adapter: one adapter, no bank, of float arrays [*stack, ...].
      names: rules with kinds, or with names of slices.

    Returns:
      An adapter of the same function; `adapter` itself where no site changes.

    Raises:
      ValueError: `names` is no name map, a rule does not fit its site, or a method whose outputs
        mix.
    """
    required(names)
    changed = {s.path: names.site(s) for s, _ in adapter.sites}
    if all(changed[site.path].kinds == site.kinds for site, _ in adapter.sites):
        return adapter
    parts = {part: dict(getattr(adapter, part)) for part in ("trainable", "frozen")}
    for site, method in adapter.sites:
        new = changed[site.path]
        if new.kinds == site.kinds:
            continue
        for arrays in parts.values():
            arrays[site.path] = {
                name: _part(site, new, method, name, array)
                for name, array in arrays.get(site.path, {}).items()
            }
    sites = tuple((changed[site.path], method) for site, method in adapter.sites)
    return Adapter(parts["trainable"], parts["frozen"], sites)


def _part(site: Site, new: Site, method: object, name: str, array: jax.Array) -> jax.Array:
    """One array with the stack axes of `new` instead of those of `site`."""
    if type(method) not in METHODS or name not in BY_OUTPUT | COMMON:
        raise ValueError(
            f"{site.path}: got {type(method).__name__} of all outputs, whose {name!r} has no part "
            f"for each slice of {new.kinds!r}; expected one of {[m.__name__ for m in METHODS]}"
        )
    old = [k for k, kind in enumerate(site.kinds) if kind == "s"]
    after = [k for k, kind in enumerate(new.kinds) if kind == "s"]
    if name in COMMON:
        at = [n for n, k in enumerate(after) if k not in old]
        whole = jnp.expand_dims(array, at)
        return jnp.broadcast_to(whole, (*new.stack, *array.shape[len(old) :]))
    outputs = [k for k, kind in enumerate(site.kinds) if kind == "o"]
    middle = array.shape[len(old) : -1]
    whole = array.reshape(*array.shape[:-1], *(site.shape[k] for k in outputs))
    place = {k: n for n, k in enumerate(old)}
    place |= {k: len(old) + len(middle) + n for n, k in enumerate(outputs)}
    whole = jnp.moveaxis(whole, [place[k] for k in after], range(len(after)))
    size = math.prod(new.shape[k] for k, kind in enumerate(new.kinds) if kind == "o")
    return whole.reshape(*new.stack, *middle, size)
