"""Convolution: a matmul with the patches under the window, which are never written down.

The matrix is [window * channels in, channels out]; multiplying the patches with a thin matrix is
the same convolution with fewer channels out.

Deviates: nothing.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from jlora.core import compat
from jlora.core.lazy import Lazy
from jlora.core.matmul import Join, Operand, applied
from jlora.core.scope import Scope
from jlora.core.site import Site, inverse_permutation, transposed
from jlora.types import Dynamic


def window(site: Site) -> tuple[int, int, int]:
    """Where a convolution kernel's window lies among its inputs.

    Args:
      site: of the kernel, or of any other weight.

    Returns:
      (before, channels, after) with d_in their product: (9, 4, 1) of Flax's [3, 3, 4, out],
      (1, 4, 9) of torch's [out, 4, 3, 3], (1, d_in, 1) of others.
    """
    kinds = site.kinds.replace("s", "")
    sizes = [n for n, kind in zip(site.shape, site.kinds, strict=True) if kind == "i"]
    if "conv" in site.ops and len(sizes) > 1 and kinds.count("o") == 1:
        if kinds[-1] == "o":
            return math.prod(sizes[:-1]), sizes[-1], 1
        if kinds[0] == "o":
            return 1, sizes[0], math.prod(sizes[1:])
    return 1, site.d_in, 1


def tucker(
    a: Float[jax.Array, "channels r"], core: Float[jax.Array, "before after r k"]
) -> Float[jax.Array, "before channels after k"]:
    """A factor of a convolution kernel from its Tucker form.

    Args:
      a: the factor of the channels.
      core: the factor of the window.

    Returns:
      Their product, [before, channels, after, k].
    """
    return jnp.einsum("cr,bark->bcak", a, core, precision="highest")


class Patches(Operand):
    """The patches [..., d_in] under a convolution's window; `x @ m` convolves with m."""

    def __init__(self, x, conv, own, kernel, shape):
        self._x, self._make = x, (conv, own, kernel, shape)
        super().__init__(lambda m: conv(x, kernel(m)), lambda: own(x), shape, x.dtype)

    def map(self, fn: Callable) -> "Patches":
        """As `Operand.map`: the patches of fn(x)."""
        return Patches(fn(self._x), *self._make)


def conv(scope: Scope, eqn: Dynamic, x: Dynamic, w: Dynamic) -> list[Dynamic] | None:
    """The rule of a convolution of any rank, stride, padding, dilation and grouping.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    if isinstance(x, Lazy) or not isinstance(w, Lazy):
        return None
    aval = eqn.outvars[0].aval
    if scope.uses is None:
        y = _convolved(scope, eqn.params, jnp.asarray(x), w, aval)
        return None if y is None else [y]
    wo, *wi = eqn.params["dimension_numbers"].rhs_spec
    size = 2 * math.prod(aval.shape) * math.prod(w.shape) // w.shape[wo]
    seen, stack = w, ()
    n = _mapped(w, wo, wi[0], eqn.params["feature_group_count"])
    if n > 1:
        apart = w.reshaped((*w.shape[:wo], n, w.shape[wo] // n, *w.shape[wo + 1 :]))
        assert apart is not None
        seen, stack, wi = apart, (wo,), [k + (k > wo) for k in wi]
    scope.note(seen, "conv", {"i": wi, "s": stack}, size)
    return compat.bind(eqn, (x, w.view()))


def _mapped(w: Lazy, wo: int, wi: int, groups: int) -> int:
    """How many kernels `jax.vmap` has laid side by side: the groups are axes of the leaf's own.

    A depthwise kernel has groups, too, of one channel in; its channels out are no stack.
    """
    n, best, head = 1, 1, set()
    dim = w.dims[wo] if w.shape[wi] > 1 else ()
    for at, a in enumerate(dim[:-1]):
        n, head = n * w.atoms[a].size, head | set(w.atoms[a].sources)
        rest = {s for b in dim[at + 1 :] for s in w.atoms[b].sources}
        rest |= {s for k in range(w.ndim) if k != wo for s in w.sources(k)}
        if groups % n == 0 and not head & rest:
            best = n
    return best


def _stacked(scope, p, x, w, aval):
    """Kernels of a stack side by side in the channels out, each on its own channels or on all."""
    spec, groups = p["dimension_numbers"], p["feature_group_count"]
    wo, fx, fy = spec.rhs_spec[0], spec.lhs_spec[1], spec.out_spec[1]
    n = math.prod(w.atoms[a].size for a in w.dims[wo] if w.atoms[a].kind == "s")
    apart = w.reshaped((*w.shape[:wo], n, w.shape[wo] // n, *w.shape[wo + 1 :]))
    unstacked = apart and apart.stacks(wo) and apart.unstack(wo)
    if not unstacked or (groups > 1 and groups % n) or p["batch_group_count"] > 1:
        return None
    arrays, rebuild = unstacked
    if groups > 1:
        x = x.reshape(*x.shape[:fx], n, x.shape[fx] // n, *x.shape[fx + 1 :])
    shape = (*aval.shape[:fy], aval.shape[fy] // n, *aval.shape[fy + 1 :])
    less = {**p, "feature_group_count": max(groups // n, 1)}
    template = scope.fork()

    def one(arrays, x, i):
        child = template.child(i)
        like = jax.ShapeDtypeStruct(shape, aval.dtype)
        return _convolved(child, less, x, rebuild(arrays), like), child.aux

    steps = jnp.arange(n, dtype=jnp.int32)
    y, aux = jax.vmap(one, (0, fx if groups > 1 else None, 0), (fy, 0))(arrays, x, steps)
    scope.join(template, aux)
    return None if y is None else y.reshape(aval.shape)


def _convolved(scope, p, x, w, aval):
    """The result, as `aval` is, of a convolution with the parameters `p`."""
    spec = p["dimension_numbers"]
    wo, *wi = spec.rhs_spec
    if w.method is not None and any(w.atoms[a].kind == "s" for a in w.dims[wo]):
        return _stacked(scope, p, x, w, aval)
    wi = sorted(wi)
    inner, out = Join(w, wi), Join(w, [wo])
    if w.method is None or sorted(inner.atoms) != w.of("i") or sorted(out.atoms) != w.of("o"):
        return None
    options = {k: v for k, v in p.items() if k != "dimension_numbers"}
    groups = p["feature_group_count"]
    last = [*(k for k in range(len(aval.shape)) if k != spec.out_spec[1]), spec.out_spec[1]]
    back = inverse_permutation(last)

    def run(x, kernel):
        y = lax.conv_general_dilated(x, kernel, dimension_numbers=spec, **options)
        return transposed(y, last)

    def kernel(m):  # [d_in, k] -> the model's layout with k output features
        axes = [*wi, wo]
        m = jnp.moveaxis(inner.split(m.T), 0, -1)
        return transposed(m.astype(x.dtype), inverse_permutation(axes))

    if groups > 1 or p["batch_group_count"] > 1:
        return _grouped(w, x, run, kernel, out, groups, p, back, aval)
    shape = (*(aval.shape[k] for k in last[:-1]), w.size("i"))
    patches = Patches(x, run, lambda x: out.join(run(x, w.view())), kernel, shape)
    y = transposed(out.split(applied(scope, w, patches, lambda x: x.own())), back)
    return y.astype(aval.dtype)


def _grouped(w, x, run, kernel, out, groups, p, back, aval):
    """Every group has patches of its own: factors if there are any, the merged kernel if not."""
    uv = w.method.factors(w.prepared())
    if uv is None or p["batch_group_count"] > 1 or out.atoms != sorted(out.atoms):
        return transposed(run(x, w.merged()), back).astype(aval.dtype)
    u, v = uv
    y = run(x, w.view())
    h = run(x, kernel(jnp.tile(u, (1, groups))))  # every group sees u: [..., groups * R]
    h = h.reshape(*h.shape[:-1], groups, u.shape[1])
    v = v.reshape(u.shape[1], groups, -1).astype(h.dtype)
    d = jnp.einsum("...gr,rgo->...go", h, v).reshape(y.shape)
    return transposed(y + d.astype(y.dtype), back).astype(aval.dtype)
