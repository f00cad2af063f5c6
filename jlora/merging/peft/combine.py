"""`add_weighted_adapter` of PEFT on LoRA adapters: factors and scales read apart, as PEFT does.

=========  =============================================
a, b       arrays of a LoRA site, [d_in, r], [r, d_out]
s_n        scale of adapter n
=========  =============================================

.. math:: (a_n, b_n, s_n, w_n) \\;\\mapsto\\; (a', b'), \\quad s' = 1

The square roots are taken in float64, as PEFT's are, so scales must not be traced.

`jlora.merging.merge("peft_...")` starts from a bank with the scales folded in, so its bits (and,
for adapters of different scale, its result) are not PEFT's; these are.

Raises ValueError for methods other than LoRA, ranks that differ (PEFT refuses them too), an
unknown kind, weights of the wrong number.

Reference: PEFT 0.21.2.
Deviates: PEFT's result keeps `use_rslora` and then scales by sqrt(r); here the scale is 1.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jlora.algebra import LowRank
from jlora.core.adapter import Adapter
from jlora.merging.engine.inputs import to_adapter
from jlora.merging.peft import factors as peft_factor
from jlora.methods.low_rank.lora import LoRA
from jlora.types import Dynamic

KINDS: dict[str, Callable[..., LowRank]] = {
    "linear": peft_factor.peft_linear,
    "cat": peft_factor.peft_cat,
    "magnitude_prune": peft_factor.peft_magnitude_prune,
    "ties": peft_factor.peft_ties,
    "dare_linear": peft_factor.peft_dare_linear,
    "dare_ties": peft_factor.peft_dare_ties,
}


def peft_merge(
    kind: str, adapters: Sequence[Adapter], weights: Sequence[float], *,
    options: Mapping[str, Dynamic] | None = None,
    masks: Mapping[str, LowRank] | None = None,
) -> Adapter:  # fmt: skip
    """Merges LoRA adapters as PEFT's `add_weighted_adapter` does, to its last bit.

    Args:
      kind: PEFT's `combination_type`, one of those without SVD.
      adapters: LoRA adapters of one rank with the same sites.
      weights: [N], of any sign.
      options: `density`, `vote`, `keys`, by name, as the functions of `factors` take them; None:
        their defaults.
      masks: {path: [N, *stack, ...]}, 0 and 1, of "dare_linear" and "dare_ties"; None: drawn from
        `keys`.

    Returns:
      A LoRA adapter of scale 1.

    Raises:
      ValueError: an unknown kind, another number of weights than adapters, and adapters that are
        not LoRA or differ in sites or rank.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {sorted(KINDS)}")
    if len(weights) != len(adapters) or not adapters:
        raise ValueError(f"weights: got {len(weights)}, expected {len(adapters)}, at least one")
    w, merged = np.asarray(weights, np.float64), {}
    sites = tuple(site for site, _ in adapters[0].sites)
    for site in sites:
        bank, scales = _read(adapters, site.path)
        signed = np.asarray(scales, np.float64) * w.reshape(-1, *[1] * len(site.stack))
        root = np.sqrt(np.abs(signed))
        roots = (jnp.asarray(np.where(signed >= 0, root, -root), jnp.float32),
                 jnp.asarray(root, jnp.float32))  # fmt: skip
        given: Dynamic = {"scales": jnp.asarray(scales)} if kind == "cat" else {"roots": roots}
        given |= {} if masks is None else {"masks": masks[site.path]}

        def one(low: LowRank, given: Dynamic) -> LowRank:
            return KINDS[kind](low, jnp.asarray(w, jnp.float32), **given, **(options or {}))

        run = one
        for _ in site.stack:
            run = jax.vmap(run, in_axes=1)
        merged[site.path] = run(bank, given)
    return to_adapter(merged, sites)


def _read(adapters: Sequence[Adapter], path: str) -> tuple[LowRank, np.ndarray]:
    rows = []
    for k, adapter in enumerate(adapters):
        by_path = {site.path: (site, method) for site, method in adapter.sites}
        if path not in by_path or len(by_path) != len(adapters[0].sites):
            raise ValueError(f"adapter {k}: {path}: expected the sites of adapter 0")
        site, method = by_path[path]
        if type(method) is not LoRA:
            raise ValueError(f"adapter {k}: {path}: got {type(method).__name__}, expected LoRA")
        arrays, _ = adapter.arrays(site)
        rows.append((arrays["a"], arrays["b"], np.asarray(arrays["scale"])))
    shapes = {(a.shape, b.shape) for a, b, _ in rows}
    if len(shapes) != 1:
        raise ValueError(f"{path}: got factors of {sorted(shapes)}, expected one shape")
    a, b, s = zip(*rows, strict=True)
    return LowRank(jnp.stack(a), jnp.stack(b)), np.stack(s)
