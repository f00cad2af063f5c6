"""The laws that every method obeys, each a function of a `Case` that raises where it is broken.

The registry names the laws that a method breaks by its nature.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jlora.contract.case import (
    NAMES,
    SHAPES,
    Case,
    block,
    close,
    scanned,
    unrolled,
)
from jlora.contract.dtype_laws import dtypes_kept, precise
from jlora.contract.tree_laws import containers, ones
from jlora.core.adapter import stack
from jlora.core.block import BlockMethod
from jlora.core.context import per_layer
from jlora.core.evaluate import DenseWeightError
from jlora.core.method import Method, Wrapper
from jlora.core.site import Arrays
from jlora.core.sites import init
from jlora.io import load_peft, save_peft
from jlora.io.peft.tables import table_of
from jlora.sharding import specs
from jlora.types import Dynamic, Tree


def empty(case: Case) -> None:
    """an empty adapter changes nothing

    Args:
      case: a method on the small model.
    """
    for adapter in ({}, None):
        assert np.array_equal(case.forward(adapter), scanned(case.params, case.x))


def identity(case: Case) -> None:
    """a fresh adapter is the identity

    Args:
      case: a method on the small model.
    """
    close(case.everything(case.fresh)["lifted"][0][1], scanned(case.params, case.x), 1e-6)


def lifted_equals_merged(case: Case) -> None:
    """lifted and merged agree in value and gradient

    Args:
      case: a method on the small model.
    """
    assert case.merges, "there is no merged weight"
    for value in case.values:
        close(value["lifted"], value["merged"])


def factored(case: Case) -> None:
    """no matmul of the gradient yields a dense weight or its gradient

    Args:
      case: a method on the small model.
    """
    jaxpr = jax.make_jaxpr(case.step(case.forward))(case.noisy[0])
    dense = {s for s in SHAPES.values()} | {s[::-1] for s in SHAPES.values()}
    for eqn in _equations(jaxpr.jaxpr):
        if eqn.primitive.name == "dot_general":
            assert eqn.outvars[0].aval.shape[-2:] not in dense, eqn


def _equations(jaxpr: Dynamic) -> Iterator[Dynamic]:
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def vmap_equals_loop(case: Case) -> None:
    """vmap over a bank is the loop over it

    Args:
      case: a method on the small model.
    """
    got = case.jit(jax.vmap(case.step(case.forward)))(stack(case.noisy))
    close(got, jax.tree.map(lambda *t: jnp.stack(t), *[v["lifted"] for v in case.values]))


def scanned_equals_unrolled(case: Case) -> None:
    """scanned and unrolled layers agree

    Args:
      case: a method on the small model.
    """
    for value in case.values:
        close(value["lifted"], value["unrolled"])


def base_unmodified(case: Case) -> None:
    """base arrays stay the same objects

    Args:
      case: a method on the small model.
    """
    before = jax.tree.map(lambda t: (t, np.array(t)), case.params)
    assert case.values
    if case.merges:
        kept = []
        jax.eval_shape(lambda a: kept.append(case.merge(case.params, a)["head"]), case.noisy[0])
        assert kept[0] is case.params["head"]
    held = jax.tree.map(lambda t, b: t is b[0] and np.array_equal(t, b[1]), case.params, before)
    assert all(jax.tree.leaves(held)), held


def peft_round_trip(case: Case, load: Callable = load_peft) -> None:
    """PEFT files give the same bits back, or are refused

    Args:
      case: a method on the small model.
      load: `jlora.io.load_peft`, or a broken one, to see the law fail.
    """
    adapter, name = case.noisy[1], type(case.method).__name__
    with tempfile.TemporaryDirectory() as folder:
        try:
            table_of(case.method)
        except ValueError:
            _refuses(ValueError, name, lambda: save_peft(folder, adapter, NAMES))
            return
        save_peft(folder, adapter, NAMES, params=case.params)
        back = load(folder, NAMES, case.params)
    assert [s.path for s, _ in back.sites] == [s.path for s, _ in adapter.sites]
    for (written, _), (read, _) in zip(adapter.sites, back.sites, strict=True):
        for want, got in zip(adapter.arrays(written), back.arrays(read), strict=True):
            assert want.keys() == got.keys()
            assert all(np.array_equal(want[k], got[k]) for k in want)


def sharded(case: Case) -> None:
    """sharded and unsharded agree

    Args:
      case: a method on the small model.
    """
    auto, explicit = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
    kernels = {"up": P(None, "fsdp", "tensor"), "down": P(None, "tensor", "fsdp")}
    kernels |= {name: P(None, "tensor") for name in ("gain", "bias") if type(case.method).vectors}
    _sharded_on(case, auto, {"layers": kernels, "head": P("fsdp", "tensor")})
    # an explicit mesh has no rule for two operands that are sharded where they are contracted
    _sharded_on(case, explicit, {"layers": dict.fromkeys(kernels, P()), "head": P(None, "tensor")})


def _sharded_on(case: Case, kind: Dynamic, layout: Tree) -> None:
    count = min(jax.device_count(), 8)
    assert count in (1, 2, 4, 8), f"a mesh needs 1, 2, 4 or 8 devices, got {count}"
    shape = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (2, 4)}[count]
    mesh = jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(kind, kind))

    def put(t: Dynamic, spec: Dynamic) -> Dynamic:
        return jax.device_put(t, NamedSharding(mesh, spec))

    shardings = specs(case.noisy[0], layout, mesh)
    adapter = jax.tree.map(jax.device_put, case.noisy[0], shardings)
    params, x = jax.tree.map(put, case.params, layout), put(case.x, P("fsdp"))
    with jax.set_mesh(mesh):
        forward = case.jit(lambda p, a, x, c: case.lift(scanned)(p, a, x, ctx=c))
        y = forward(params, adapter, x, jax.tree.map(lambda t: put(t, P()), case.ctx))
    close(y, case.values[0]["lifted"][0][1])


def errors_name_the_site(case: Case) -> None:
    """what cannot be done is an error that names it

    Args:
      case: a method on the small model.
    """

    def bent(params, x):
        return scanned(params, x) + jnp.sin(params["layers"]["up"]).sum()

    layers = {**case.params["layers"], "up": jnp.zeros((2, 8, 8))}
    methods, key = {"layer/up": case.method}, jax.random.key(0)
    _refuses(DenseWeightError, "layers/up 'sin'", lambda: case.forward(case.fresh, model=bent))
    start = functools.partial(init, key, scanned, case.params, case.x, methods=methods)
    _refuses(ValueError, "'layer/up' layers/up", start)
    _refuses(
        ValueError,
        "layers/up (2, 8, 8) (2, 8, 12)",
        lambda: case.forward(
            case.fresh, params={**case.params, "layers": layers}, model=lambda p, x: x
        ),
    )


def _refuses(kind: type[Exception], words: str, run: Callable) -> None:
    try:
        run()
    except kind as error:
        assert all(w in str(error) for w in words.split(" ")), f"{words!r} not in {error}"
    else:
        raise AssertionError(f"no {kind.__name__} that says {words!r}")


def compiled_once(case: Case) -> None:
    """other values do not recompile

    Args:
      case: a method on the small model.
    """
    for adapter in (case.fresh, *case.noisy):
        case.everything(adapter)
    assert case.everything._cache_size() == 1  # type: ignore[attr-defined]


def gradients_nonzero(case: Case) -> None:
    """every declared trainable has a gradient

    Args:
      case: a method on the small model.
    """
    _, start = case.everything(case.fresh)["lifted"]
    assert any(np.any(g) for g in jax.tree.leaves(start)), "a fresh adapter cannot learn"
    for value in case.values:
        for path, g in jax.tree_util.tree_leaves_with_path(value["lifted"][1]):
            assert np.all(np.isfinite(g)), path
            layers = 2 if path[0].key.startswith("layers") else 1
            live = np.any(np.reshape(g, (layers, -1)), axis=1)
            assert np.all(live), f"no gradient: {jax.tree_util.keystr(path)}"


@dataclasses.dataclass(frozen=True)
class Gated(Wrapper):
    """`method` where ctx["gate"] is 1, the base where it is 0."""

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> jax.Array:
        """The method's output or the base's, by ctx["gate"]."""
        out = self.method.apply(x, w, p, ctx)
        tuned, plain = out[0] if isinstance(out, tuple) else out, x @ w
        return plain + ctx["gate"].astype(tuned.dtype) * (tuned - plain)


def context_per_layer(case: Case) -> None:
    """a side input with a value for each layer reaches the layer that it is for

    Args:
      case: a method on the small model.
    """
    if type(case.method).vectors or isinstance(case.method, BlockMethod):
        return  # a vector has no `apply`, and a block's method none of its own
    adapter = case.noisy[0]
    gated = adapter.replace(sites=tuple((s, Gated(m)) for s, m in adapter.sites))
    ctx = {**case.ctx, "gate": per_layer(jnp.asarray([1.0, 0.0]))}
    base = jax.tree.map(lambda w: w[1], case.params["layers"])

    def first(params: Tree, x: jax.Array) -> jax.Array:  # the second layer is not of the parameters
        x = block(x, jax.tree.map(lambda w: w[0], params["layers"]))
        return block(x, base) @ params["head"]

    def run(adapter, gated):
        both = [case.lift(m)(case.params, gated, case.x, ctx=ctx) for m in (scanned, unrolled)]
        return both, case.forward(adapter, model=first)

    both, want = case.jit(run)(adapter, gated)
    for got in both:
        close(got, want)


LAWS: dict[str, Callable[[Case], None]] = {
    "L1": empty,
    "L2": identity,
    "L3": lifted_equals_merged,
    "L4": factored,
    "L5": vmap_equals_loop,
    "L6": scanned_equals_unrolled,
    "L7": base_unmodified,
    "L8": peft_round_trip,
    "L9": sharded,
    "L10": errors_name_the_site,
    "L11": compiled_once,
    "L12": dtypes_kept,
    "L13": gradients_nonzero,
    "L14": precise,
    "L15": context_per_layer,
    "L16": containers,
    "L17": ones,
}


def text(law: Callable[[Case], None]) -> str:
    """What a law says.

    Args:
      law: one of `LAWS`.

    Returns:
      The first line of its documentation.
    """
    return (law.__doc__ or "").partition("\n")[0]


def check(method: Method, breaks: Container[str] = ()) -> None:
    """All laws on one method, those in `breaks` left out.

    Args:
      method: of which an adapter of the small model is made.
      breaks: names of laws that are left out.

    Raises:
      AssertionError: a law is broken; the message begins with its number and its text.
    """
    case = Case(method)
    for name, law in LAWS.items():
        if name not in breaks:
            try:
                law(case)
            except AssertionError as error:
                raise AssertionError(f"{name}, {text(law)}: {error}") from error
