"""`merge`: what an adapter means; `delta`: what it adds.

Each adapted leaf is seen as matrices [d_in, d_out], one a stack slice, and replaced by
`method.merge` of them, computed in at least float32 and cast to the leaf's dtype once. The
parameters given are not touched, and all other leaves are the same objects in the result.

Deviates: nothing.
"""

from typing import Any

import jax

from jlora.core.adapter import Adapter
from jlora.core.lazy import leaf, merged
from jlora.core.lift import check, flatten, is_array
from jlora.core.method import Method
from jlora.core.site import Site, at_least_float32, fold


def merge(params: Any, adapter: Adapter) -> Any:
    """params' with every adapted leaf merged; quantised leaves, adapted or not, come out dense.

    Raises ValueError for a site that is not in params, NotImplementedError for a method whose
    delta depends on the activation.
    """
    leaves, tree = flatten(params)
    check({k: v for k, v in leaves.items() if is_array(v)}, adapter)
    plain = {k: v.dequantize() if hasattr(v, "dequantize") else v for k, v in leaves.items()}
    for site, method in adapter.sites:
        plain[site.path] = leaf(leaves[site.path], site, method, *adapter.arrays(site)).merged()
    return jax.tree.unflatten(tree, list(plain.values()))


def delta(params: Any, adapter: Adapter) -> dict[str, jax.Array]:
    """{path: merge(w, p) - w} as [*stack, d_in, d_out] in at least float32 (dense: for tests)."""
    leaves, _ = flatten(params)
    check({k: v for k, v in leaves.items() if is_array(v)}, adapter)
    return {
        site.path: _delta(leaves[site.path], site, method, *adapter.arrays(site))
        for site, method in adapter.sites
    }


def _delta(w: Any, site: Site, method: Method, own: Any, shared: Any) -> jax.Array:
    m = fold(w.dequantize() if hasattr(w, "dequantize") else w, site.kinds)
    after = merged(method, m, own, shared, len(site.stack))
    return after - m.astype(at_least_float32(m.dtype))
