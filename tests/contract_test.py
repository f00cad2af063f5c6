"""Every method of the registry obeys the laws, and every law can be seen to fail.

Exceptions are named in the registry; one that is none fails here too.
"""

import dataclasses
import functools
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest

import jlora as jl
from jlora import registry
from jlora.contract import FAST_COMPILE, LAWS, Case, check, peft_round_trip
from jlora.methods import LoRA, VBLoRA

EXAMPLES = {
    f"{name}{k or ''}": (system, method)
    for name, system in registry.methods().items()
    for k, method in enumerate(system.examples)
}
# L1 knows no method, L15 hardly; of its further forms, L9, L10, L16 and L17 say what they say of a
# method.
TRIALS = [
    (example, law)
    for example in EXAMPLES
    for law in LAWS
    if not (law == "L1" and example != "LoRA")
    and not (law == "L15" and example not in ("LoRA", "DoRA", "VBLoRA"))
    and not (
        law in ("L9", "L10", "L16", "L17")
        and example[-1].isdigit()
        and example not in registry.methods()
    )
]


def options():
    """The compiler's, with what saves most of its time where this release knows it."""
    quick = {**FAST_COMPILE, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda x: x + 1, compiler_options=quick)(1.0)
    except Exception:  # the type of the error differs between releases
        return FAST_COMPILE
    return quick


CASE = functools.partial(Case, options=options())


@pytest.fixture(scope="module")
def cases():
    return functools.cache(lambda name: CASE(EXAMPLES[name][1]))


@pytest.mark.parametrize(("example", "law"), TRIALS)
def test_law(example, law, cases):
    if law in EXAMPLES[example][0].breaks:
        with pytest.raises(AssertionError):
            LAWS[law](cases(example))
    else:
        LAWS[law](cases(example))


class Loud(LoRA):  # L2: does not start at zero
    def init(self, key, site, context):
        trainable, frozen = super().init(key, site, context)
        return {**trainable, "b": trainable["b"] + 1}, frozen


class Drifting(LoRA):  # L3: the fast path is not the definition
    def apply(self, x, w, p, ctx):
        return super().apply(x, w, {**p, "b": 1.02 * p["b"]}, ctx)


class Blind(LoRA):  # L3: right in value, wrong in gradient
    def apply(self, x, w, p, ctx):
        return super().apply(x, w, {**p, "a": jax.lax.stop_gradient(p["a"])}, ctx)


class Dense(LoRA):  # L4: merges in the step
    def apply(self, x, w, p, ctx):
        return x @ w.merged(self, p)


@jax.custom_batching.custom_vmap
def zero(x):
    return x * 0


@zero.def_vmap
def _(size, batched, x):
    return jnp.ones_like(x), True


class Alone(LoRA):  # L5: is something else in a bank
    def apply(self, x, w, p, ctx):
        y = super().apply(x, w, p, ctx)
        return y + zero(jax.lax.stop_gradient(p["b"])).sum()


class Counting(LoRA):  # L6: depends on how often it was traced
    calls: ClassVar = itertools.count(1)

    def apply(self, x, w, p, ctx):
        return super().apply(x, w, {**p, "b": p["b"] * next(self.calls)}, ctx)


class Meshy(LoRA):  # L9: looks at the mesh
    def apply(self, x, w, p, ctx):
        factor = 1 if jax.sharding.get_abstract_mesh().empty else 2
        return super().apply(x, w, {**p, "b": factor * p["b"]}, ctx)


@dataclasses.dataclass(frozen=True)
class Fussy(LoRA):  # L11: takes alpha for structure
    alpha: float = 8.0


class Half(LoRA):  # L12: keeps float16
    def init(self, key, site, context):
        return jax.tree.map(lambda t: t.astype(jnp.float16), super().init(key, site, context))


class Dead(LoRA):  # L13: declares what it does not use
    def init(self, key, site, context):
        trainable, frozen = super().init(key, site, context)
        return {**trainable, "unused": jnp.ones(3)}, frozen


class Narrow(LoRA):  # L14: rounds its scale to the dtype that it is kept in
    def prepare(self, p):
        return p


class Rounding(LoRA):  # L14: right dtypes, computed in fewer digits
    def apply(self, x, w, p, ctx):
        return super().apply(x, w, {**p, "a": jax.lax.reduce_precision(p["a"], 8, 7)}, ctx)


@dataclasses.dataclass(frozen=True)
class Deaf(VBLoRA):  # L13: what all sites share does not learn
    num_vectors: int = 6
    vector_length: int = 4

    def factors(self, p):
        return super().factors({**p, "bank": jax.lax.stop_gradient(p["bank"])})


class Selfish(Deaf):  # L3: only the first layer's sites train what all share
    indexed: ClassVar = True

    def factors(self, p):
        return VBLoRA.factors(self, p)

    def apply(self, x, w, p, ctx):
        bank = jnp.where(ctx["index"] == 0, p["bank"], jax.lax.stop_gradient(p["bank"]))
        return super().apply(x, w, {**p, "bank": bank}, ctx)


def first_layer_lift(fn):  # L15: every layer gets the side input of the first
    def run(params, adapter, *x, ctx=None, **kw):
        per_site = {k: v for k, v in (ctx or {}).items() if isinstance(v, jl.PerSite)}
        same = jax.tree.map(lambda t: jnp.broadcast_to(t[:1], t.shape), per_site)
        return jl.lift(fn)(params, adapter, *x, ctx={**(ctx or {}), **same}, **kw)

    return run


def noisy_lift(fn):  # L1: alters the empty case
    return lambda params, adapter, *x, **kw: jl.lift(fn)(params, adapter, *x, **kw) + 1


def copying_merge(params, adapter):  # L7: copies what it need not touch
    return {**jl.merge(params, adapter), "head": params["head"] + 0.0}


def merge_as_made(params, adapter):  # L14: leaves in the dtype of the site
    kind = adapter.sites[0][0].dtype
    return jax.tree.map(lambda t: t.astype(kind), jl.merge(params, adapter))


def dicts_only_lift(fn):  # L16: knows no other container
    def run(params, adapter, *x, **kw):
        return jl.lift(fn)(params, adapter if isinstance(params, dict) else None, *x, **kw)

    return run


def dicts_only_merge(params, adapter):  # L16: the same, merged
    return jl.merge(params, adapter) if isinstance(params, dict) else params


class Squeezed(LoRA):  # L17: the base alone for a single row
    def apply(self, x, w, p, ctx):
        return super().apply(x, w, p, ctx) if x.shape[0] > 1 else x @ w


class Lonely(LoRA):  # L17: right in value, no gradient for a single row
    def apply(self, x, w, p, ctx):
        held = p if x.shape[0] > 1 else jax.tree.map(jax.lax.stop_gradient, p)
        return super().apply(x, w, held, ctx)


DOUBLES = [
    ("L1", LoRA, {"lift": noisy_lift}),
    ("L2", Loud, {}),
    ("L3", Drifting, {}),
    ("L3", Blind, {}),
    ("L4", Dense, {}),
    ("L5", Alone, {}),
    ("L6", Counting, {}),
    ("L7", LoRA, {"merge": copying_merge}),
    ("L9", Meshy, {}),
    ("L10", LoRA, {"lift": functools.partial(jl.lift, on_dense="merge")}),
    ("L11", Fussy, {}),
    ("L12", Half, {}),
    ("L13", Dead, {}),
    ("L14", Narrow, {}),
    ("L14", Rounding, {}),
    ("L14", LoRA, {"merge": merge_as_made}),
    ("L13", Deaf, {}),
    ("L3", Selfish, {}),
    ("L15", LoRA, {"lift": first_layer_lift}),
    ("L16", LoRA, {"lift": dicts_only_lift}),
    ("L16", LoRA, {"merge": dicts_only_merge}),
    ("L17", Squeezed, {}),
    ("L17", Lonely, {}),
]


@pytest.mark.parametrize(("law", "method", "faults"), DOUBLES)
def test_mutation_a_broken_law_is_seen(law, method, faults):
    with pytest.raises(AssertionError):
        LAWS[law](CASE(method(rank=2), **faults))


def test_mutation_a_file_that_changes_a_bit_is_seen(cases):
    def rounds(*args):
        halve = lambda t: t.astype(jnp.bfloat16).astype(t.dtype)  # noqa: E731
        return jax.tree.map(halve, jl.io.load_peft(*args))

    with pytest.raises(AssertionError):
        peft_round_trip(cases("LoRA"), load=rounds)


def test_check_names_the_law_and_leaves_out_what_is_excused():
    with pytest.raises(AssertionError, match=r"^L2, a fresh adapter is the identity"):
        check(Loud(rank=2), breaks=("L1",))
    check(Dead(rank=2), breaks=set(LAWS) - {"L4"})
