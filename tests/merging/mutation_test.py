"""The tests of merging can fail: a piece of every system is broken, and a test of it notices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import numerics, registry
from jlora.algebra import LowRank
from jlora.merging import METHODS
from jlora.merging.engine.election import everything, spread
from jlora.merging.exact import slerp as slerps
from jlora.merging.exact.concat import concat
from jlora.merging.spectral import cart as carts
from jlora.merging.spectral import lion as lions
from tests.doubles import broken, given, instead, load, module_of, names, options, returns, where

D = ("make", "dense")  # fixtures of `conftest`
ROOMS = ("merging", "retrieval", "compose")


def one_rank_more(right):
    return lambda bank, w, *, rank, keep=None: right(bank, w, rank=rank + 1, keep=keep)


def by_outputs(bank, weights, *, axis="flat"):
    """`nuslerp` of vectors that are outputs, as `slerp` has them."""
    return slerps.slerp(bank, weights)


def straight(out, aa, bb, ab, t):
    """The first coefficient on the line, not on the sphere."""
    return out.at[0].set(jnp.broadcast_to(1 - t, out[0].shape))


def signs_turned(cond, a, b):
    turned = isinstance(a, float) and (a, b) == (1.0, -1.0)
    return jnp.where(cond, b, a) if turned else jnp.where(cond, a, b)


def around_zero(bank, weights, *, rank=None, scale=1.0):
    """CART whose parts are those of the adapters, not of their differences from the mean."""
    core = carts.to_core(bank)
    full = min(bank.u.shape[1], bank.v.shape[2])
    cut = functools.partial(carts._cut, rank or int(np.ceil(0.08 * full)))
    own = jax.vmap(functools.partial(carts.spectral, cut))(core.cores)
    total = jnp.einsum("n,npq->pq", weights, core.cores) + scale * jnp.sum(own, axis=0)
    return carts.from_core(core, total)


def shared_by_all(right):
    """The mean divides by all weights, also of adapters that lost the vote."""

    def elect(x, weights, *, vote="sum", normalize=True):
        return right(x, weights, vote=vote, normalize=False) / jnp.sum(jnp.abs(weights))

    return elect


def reversed_odds(d, keep, keys, numbers):
    """Small elements are kept more often than large ones."""
    return d, 2 * jnp.mean(keep, axis=-1, keepdims=True) - keep, keys, numbers


def equal_odds(d, keep, keys, numbers):
    return d, jnp.broadcast_to(jnp.mean(keep, -1, keepdims=True), keep.shape), keys, numbers


def energies_of_one(out, *_):
    return jnp.ones_like(out) if jnp.issubdtype(out.dtype, jnp.floating) else out


def second_moment(d, weights):
    live = spread((weights != 0).astype(d.dtype), d)
    return jnp.sum(live * d**2, axis=0, keepdims=True) / jnp.maximum(jnp.sum(live), 1.0)


def near_the_total(d, total, sharpness):
    return (jnp.abs(d) >= sharpness * jnp.abs(total[None])).astype(jnp.int32)


def over_outputs(spec, *x, **k):
    return jnp.einsum(spec.replace("nro,nmrs,mso->nmo", "nrp,nmrs,mso->nmo"), *x, **k)


def largest_alone(x, density):
    top = jnp.max(jnp.abs(x), axis=(1, 2), keepdims=True)
    return jnp.where(jnp.abs(x) >= top, x, jnp.zeros_like(x))


def minority(x, c, vote):
    """The losing sign is elected."""
    tally = jnp.sum(x if vote == "total" else jnp.sign(x), axis=0)
    agree = (jnp.sign(x) == jnp.where(tally >= 0, -1.0, 1.0)[None]).astype(x.dtype)
    return jnp.sum(c[:, None, None] * x * agree, axis=0) / jnp.maximum(jnp.sum(agree, axis=0), 1.0)


def not_rescaled(out, bank, density, *_):
    return LowRank(out.u * density, out.v * density)


def masked_alone(bank, density, keys, masks):
    return lambda d, numbers: d * masks[:, numbers]


def lengths_of_one(right):
    """Whole units, both halves, count as of length one, so that centres keep their own."""
    whole = 6 + 5  # d_in + d_out of the test
    return lambda x, norm: jnp.ones_like(x[:, :1]) if x.shape[1] == whole else right(x, norm)


def alternating(out, bank):
    sign = jnp.where(jnp.arange(out.u.shape[-1]) % 2, -1.0, 1.0)
    return LowRank(out.u * sign[None, None], out.v)


def not_orthogonal(bank, weights, *, inputs=None, floor=1e-4):
    return lions.lion(bank, weights, inputs=inputs)


def inverse_values(c):
    values, vectors = numerics.eigh(c)
    return 1 / values, vectors


def root_of_scalars_is_one(x):
    return jnp.ones_like(x) if x.ndim == 0 else jnp.sqrt(x)


def second_factor_unweighted(spec, w, *x, **k):
    return jnp.einsum(spec, jnp.ones_like(w) if spec == "n,nro->ro" else w, *x, **k)


class Fixed(np.ndarray):
    """An array in which nothing can be written."""

    def __setitem__(self, *_):
        pass


def turned(out, *_):
    return -out


# (system, module, its piece, how it is wrong, a test of the system, its arguments)
BROKEN = [
    ("concat", "concat", "concat", given(lambda bank, w: (bank, jnp.ones_like(w))),
     "concat.value_by_numpy", D),
    ("truncated", "truncated", "dot",
     where("ip,pq,kq,k->ik", lambda right, *x: right(*x[:3], 1 / x[3])),
     "truncated.value_and_error_by_dense_svd", (2, *D)),
    ("truncated", "truncated", "truncation_error", one_rank_more,
     "truncated.value_and_error_by_dense_svd", (2, *D)),
    ("slerp", "slerp", "_pair", returns(straight), "slerp.value_by_numpy", ("out", *D)),
    ("nuslerp", "slerp", "nuslerp", instead(by_outputs), "slerp.value_by_numpy", ("flat", *D)),
    ("multislerp", "slerp", "jnp", names(arctan2=lambda sin, cos: sin),
     "slerp.multislerp_by_numpy", D),
    ("karcher", "slerp", "mean_direction", given(lambda bank, w, steps: (bank, w, 1)),
     "karcher.it_is_stationary_and_of_mean_norm", D),
    ("knots", "knots", "dot", where("kq,qo->ko", lambda right, y, r: r), "knots.value_by_numpy", D),
    ("core_space", "core_space", "jnp", names(sqrt=jnp.ones_like), "core_space.value_by_numpy", D),
    ("core_space", "core_space", "jnp", names(where=signs_turned), "core_space.value_by_numpy", D),
    ("tsv", "tsv", "polar", instead(lambda x: x), "tsv.value_by_numpy", (2, *D)),
    ("iso_c", "iso", "_mean", instead(lambda s: s[0]), "iso.iso_c_by_numpy", D),
    ("iso_cts", "iso", "dot", where("pk,rk,nrq->npq", lambda right, *x: 0 * right(*x)),
     "iso.iso_cts_by_numpy", (0.5, *D)),
    ("wudi", "wudi", "interference",
     given(lambda cores, w: (cores, w * jnp.sum(cores**2, axis=(1, 2)))),
     "wudi.value_by_the_normal_equations", ({"d_in": 4}, *D)),
    ("cart", "cart", "cart", instead(around_zero), "cart.value_by_numpy", ({}, *D)),
    ("robust_merge", "robust_merge", "jnp", names(maximum=lambda s, least: jnp.ones_like(s)),
     "robust_merge.value_by_numpy", D),
    # --- elements ---
    ("task_arithmetic", "task_arithmetic", "task_arithmetic", options(scale=1.0),
     "task_arithmetic.value", ()),
    ("ties", "election", "majority", returns(turned), "ties.value", ({},)),
    ("ties", "threshold", "above", returns(lambda out, *_: ~out), "ties.value", ({},)),
    ("magnitude", "magnitude", "trimmed", given(lambda bank, p, *block: (bank, 0.99, *block)),
     "magnitude.value", (0.6,)),
    ("dare_linear", "masks", "dropped", options(rescale=False), "dare.linear_value", (0.4,)),
    ("dare_linear", "masks", "dropped", given(lambda d, keep, *x: (d, 1 - keep, *x)),
     "dare.linear_value", (0.4,)),
    ("dare_ties", "election", "elect", shared_by_all, "dare.ties_value", ()),
    ("della", "della", "dropped", given(reversed_odds), "della.value", ()),
    ("della_linear", "della", "dropped", given(equal_odds), "della.linear_value", ()),
    ("breadcrumbs", "breadcrumbs", "_band",
     given(lambda low, high, *x: (low, jnp.full_like(high, jnp.inf), *x)),
     "breadcrumbs.value", (0.5, 0.1)),
    ("breadcrumbs_ties", "breadcrumbs", "banded", instead(lambda *_: everything),
     "breadcrumbs.ties_value", ()),
    ("sce", "sce", "fold", returns(energies_of_one), "sce.value", (0.2,)),
    ("sce", "sce", "variance", instead(second_moment), "sce.value", (0.2,)),
    ("consensus", "consensus", "task_masks", instead(near_the_total), "consensus.value", (0.4, 2)),
    ("model_stock", "model_stock", "ratio", returns(lambda out, bank, *_: out / len(bank.u)),
     "model_stock.value", (False,)),
    ("model_stock", "model_stock", "jnp", names(einsum=over_outputs), "model_stock.value",
     (True,)),
    # --- as PEFT ---
    ("peft_linear", "factors", "_both", given(lambda bank, w, *x: (bank, jnp.abs(w), *x)),
     "factors.roots_of_the_weights_alone", ()),
    ("peft_cat", "factors", "peft_cat", options(scales=None), "factors.cat_is_exact", ()),
    ("peft_magnitude_prune", "factors", "pruned", instead(largest_alone),
     "factors.magnitude_prune", ()),
    ("peft_ties", "factors", "jnp", names(maximum=lambda x, y: jnp.ones_like(x)), "factors.ties",
     ("total",)),
    ("peft_dare_linear", "factors", "_dropped", returns(not_rescaled), "factors.dare", ()),
    ("peft_dare_ties", "factors", "disjoint", instead(minority), "factors.dare", ()),
    ("peft_svd", "svd", "truncated", given(lambda bank, w: (bank, jnp.abs(w))), "svd.svd", ()),
    ("peft_magnitude_prune_svd", "svd", "trimmed", instead(lambda *_: everything),
     "svd.magnitude_prune", ()),
    ("peft_ties_svd", "svd", "jnp", names(maximum=lambda x, y: jnp.ones_like(x)), "svd.ties",
     ("total",)),
    ("peft_dare_linear_svd", "svd", "_drop", instead(masked_alone), "svd.dare", ()),
    ("peft_dare_ties_svd", "svd", "_disjoint", instead(minority), "svd.dare", ()),
    # --- systems ---
    ("do_merging", "do_merging", "orthogonalised", options(gamma=0.0),
     "do_merging.descent_by_numpy_on_dense_deltas", ()),
    ("do_decoupled", "do_merging", "decoupled", instead(concat), "do_merging.decoupling_by_numpy",
     ("W",)),
    ("lego", "lego", "jnp", names(sqrt=root_of_scalars_is_one), "lego.value_by_numpy", (1,)),
    ("lego", "lego", "_length", lengths_of_one, "lego.value_by_numpy", (2,)),
    ("lego_spectral", "lego", "spectral", returns(alternating), "lego.spectral_value_by_numpy",
     ()),
    ("lion", "lion", "_norms", returns(lambda out, *_: (out[0], jnp.ones_like(out[1]))),
     "lion.value_by_numpy", (None,)),
    ("lion_orthogonal", "lion", "lion_orthogonal", instead(not_orthogonal),
     "lion.orthogonal_fusion_by_numpy_and_linear_scale", ()),
    ("lion_orthogonal", "lion", "numerics", names(eigh=inverse_values),
     "lion.orthogonal_fusion_by_numpy_and_linear_scale", ()),
    ("factor_mix", "lorahub", "jnp", names(einsum=second_factor_unweighted),
     "lorahub.factor_mix_by_numpy_and_its_cross_terms", ()),
    ("LoraHub", "coefficients", "jnp", names(abs=lambda x: x), "lorahub.objective_by_numpy", ()),
    ("LoraHub", "lorahub", "penalised", given(lambda loss, x, l1, fn: (loss, x, 1, fn)),
     "lorahub.search_keeps_the_best_it_has_seen", ()),
    ("LoraHub by gradient", "lorahub", "learn", options(l1=0.0), "lorahub.descent_by_numpy", ()),
    ("CMA-ES", "cma", "jnp", names(argsort=lambda x: jnp.argsort(-x)),
     "lorahub.cma_finds_the_bottom_of_a_narrow_valley", ()),
    ("CMA-ES", "cma", "jnp", names(einsum=lambda *x: 0 * jnp.einsum(*x)),
     "lorahub.cma_by_numpy_in_one_dimension", ()),
    ("Coefficients by gradient", "coefficients", "penalised",
     given(lambda loss, x, l1, *fn: (loss, x, -l1, *fn)),
     "coefficients.gradient_by_finite_differences_and_by_dense_merging", ()),
    ("AdaMerging", "adamerging", "entropy", returns(turned), "adamerging.entropy_by_numpy", ()),
    ("PSEC", "psec", "jnp",
     names(repeat=lambda x, r, axis: jnp.ones_like(jnp.repeat(x, r, axis=axis))),
     "psec.every_row_has_its_own_merged_weight", ()),
    ("AutoLoRA: retrieval", "weight_encoder", "_norm", instead(lambda x: x),
     "weight_encoder.tokens_by_numpy", ()),
    ("AutoLoRA: retrieval", "weight_encoder", "math", names(sqrt=lambda x: 1.0),
     "weight_encoder.embedding_by_numpy", ()),
    ("AutoLoRA: gated fusion", "gated_fusion", "fuse",
     given(lambda p, *x: (p | {"both": jnp.zeros_like(p["both"])}, *x)),
     "weight_encoder.gate_by_numpy", ()),
    ("LoRA Composite", "composite", "composite",
     returns(lambda out, model, params, bank, w, z, t: out - model(params, z, t)),
     "composite.the_weighted_mean_of_predictions_by_numpy", ()),
    ("LoRA Switch", "composite", "switch", options(stay=1), "composite.turns_by_hand", ()),
    ("LCM-LoRA arithmetic", "lcm_arithmetic", "gather", given(lambda a, w: (a, jnp.roll(w, 1))),
     "lcm_arithmetic.value_by_dense_matrices_where_sites_differ", ()),
    # --- around them ---
    ("Safe spectral functions", "spectral_functions", "_quotient",
     instead(lambda x, y, near, limit: limit),
     "spectral_functions.derivative_is_that_of_differences", ("distinct", False)),
    ("Conversion to LoRA", "convert", "merged",
     returns(lambda out, method, m, *_: out + m.astype(out.dtype)),
     "convert.a_bank_of_unfactored_adapters", ("base",)),
    ("Conversion to LoRA", "convert", "_ranks",
     given(lambda a, s, r, energy, error: (a, s, r, energy and 1 - energy, error)),
     "convert.ranks_by_energy_and_error_by_hand", ()),
    ("Interference diagnostics", "diagnostics", "jnp", names(minimum=jnp.maximum),
     "diagnostics.overlap_by_numpy", D),
    ("Interference diagnostics", "diagnostics", "jnp", names(abs=lambda x: x),
     "diagnostics.signs_by_numpy", (8, *D)),
    ("Duplicates, clusters and retrieval in a bank", "banks", "np",
     names(ones=lambda n: np.ones(n).view(Fixed)), "banks.clusters_are_those_of_scipy", ()),
]  # fmt: skip


@pytest.fixture(autouse=True)
def uncached():
    """Compiled programs know nothing of the broken piece, or of nothing else."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    ("system", "module", "piece", "change", "test", "args"),
    BROKEN,
    ids=[f"{row[0]}-{row[2]}-{row[4].split('.')[1]}" for row in BROKEN],
)
def test_a_broken_piece_is_noticed(monkeypatch, request, system, module, piece, change, test, args):
    file, name = test.split(".")
    tests = load(file, *ROOMS)
    made = {"base": lambda: tests.weights(), "W": lambda: tests.W}
    made |= {name: functools.partial(request.getfixturevalue, name) for name in D}
    args = [made[a]() if isinstance(a, str) and a in made else a for a in args]
    broken(monkeypatch, module_of(module, *ROOMS), piece, change, tests)
    with pytest.raises(AssertionError):
        getattr(tests, f"test_{name}")(*args)


def test_every_system_has_a_broken_piece():
    others = {p.system.name for p in registry.systems() if p.family in ROOMS}
    assert {row[0] for row in BROKEN} == METHODS.keys() | others
