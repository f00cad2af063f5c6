"""The tests of merging can fail: a piece of every system is broken, and a test of it notices."""

import functools

import jax
import pytest

from jlora import registry
from jlora.merging import METHODS
from tests.mutants import broken, load, module_of

D = ("make", "dense")  # fixtures of `conftest`
ROOMS = ("merging", "retrieval", "compose")

# (system, module, its piece, what it becomes, a test of the system, its arguments)
BROKEN = [
    ("concat", "concat", "bank.u * weights[:, None, None]", "bank.u", "concat.value_by_numpy", D),
    ("truncated", "truncated", "1 / root", "root",
     "truncated.value_and_error_by_dense_svd", (2, *D)),
    ("truncated", "truncated", "< kept, 0.0", "<= kept, 0.0",
     "truncated.value_and_error_by_dense_svd", (2, *D)),
    ("slerp", "slerp", "jnp.sin((1 - t) * angle) / sin", "(1 - t)", "slerp.value_by_numpy",
     ("out", *D)),
    ("nuslerp", "slerp", "return slerp(bank, weights, axis=axis)", "return slerp(bank, weights)",
     "slerp.value_by_numpy", ("flat", *D)),
    ("multislerp", "slerp", "jnp.arctan2(safe, cos) / ", "safe / ", "slerp.multislerp_by_numpy", D),
    ("karcher", "slerp", "length=steps", "length=1",
     "karcher.it_is_stationary_and_of_mean_norm", D),
    ("knots", "knots", 'dot("kq,qo->ko", y, core.right)', "core.right", "knots.value_by_numpy", D),
    ("core_space", "core_space", "root = jnp.sqrt(s)", "root = jnp.ones_like(s)",
     "core_space.value_by_numpy", D),
    ("core_space", "core_space", ">= 0, 1.0, -1.0)", "< 0, 1.0, -1.0)",
     "core_space.value_by_numpy", D),
    ("tsv", "tsv", "polar(jnp.moveaxis(x, 0, 1).reshape(p, n * k))",
     "jnp.moveaxis(x, 0, 1).reshape(p, n * k)", "tsv.value_by_numpy", (2, *D)),
    ("iso_c", "iso", "support(s, s.shape[0]) * _mean(s)", "support(s, s.shape[0]) * s[0]",
     "iso.iso_c_by_numpy", D),
    ("iso_cts", "iso", "tasks - dot(", "tasks - 0 * dot(", "iso.iso_cts_by_numpy", (0.5, *D)),
    ("wudi", "wudi", "weights / jnp.where(live, norm, one)", "weights",
     "wudi.value_by_the_normal_equations", ({"d_in": 4}, *D)),
    ("cart", "cart", "(core.cores - mean[None])", "(core.cores)", "cart.value_by_numpy", ({}, *D)),
    ("robust_merge", "robust_merge", "live * jnp.maximum(s, least) *", "live *",
     "robust_merge.value_by_numpy", D),
    # --- elements ---
    ("task_arithmetic", "task_arithmetic", "normalize) * scale", "normalize)",
     "task_arithmetic.value", ()),
    ("ties", "election", "tally >= 0", "tally < 0", "ties.value", ({},)),
    ("ties", "threshold", ">= threshold[:, None, None]", "< threshold[:, None, None]", "ties.value",
     ({},)),
    ("magnitude", "magnitude", "trimmed(bank, density, block)", "trimmed(bank, 0.99, block)",
     "magnitude.value", (0.6,)),
    ("dare_linear", "masks", "kept * (STEPS / p.astype(d.dtype)) if rescale else kept", "kept",
     "dare.linear_value", (0.4,)),
    ("dare_linear", "masks", "mask = words(", "mask = ~words(", "dare.linear_value", (0.4,)),
    ("dare_ties", "election", "jnp.abs(w) * agree, axis=0", "jnp.abs(w), axis=0",
     "dare.ties_value", ()),
    ("della", "della", "2.0 * epsilon * place", "2.0 * epsilon * (1.0 - place)", "della.value", ()),
    ("della_linear", "della", "2.0 * epsilon * place", "epsilon", "della.linear_value", ()),
    ("breadcrumbs", "breadcrumbs", " & ~threshold.above(x, high)", "", "breadcrumbs.value",
     (0.5, 0.1)),
    ("breadcrumbs_ties", "breadcrumbs", "partial(voted, band,", "partial(voted, everything,",
     "breadcrumbs.ties_value", ()),
    ("sce", "sce", "raw = jnp.abs(weights) * fold(", "raw = jnp.abs(weights) + 0 * fold(",
     "sce.value", (0.2,)),
    ("sce", "sce", "live * (d - mean) ** 2", "live * d**2", "sce.value", (0.2,)),
    ("consensus", "consensus", "total[None] - d", "total[None]", "consensus.value", (0.4, 2)),
    ("model_stock", "model_stock", "n * pairs / jnp", "pairs / jnp", "model_stock.value", (False,)),
    ("model_stock", "model_stock", '"nro,nmrs,mso->nmo"', '"nrp,nmrs,mso->nmo"',
     "model_stock.value", (True,)),
    # --- as PEFT ---
    ("peft_linear", "factors", "jnp.where(weights >= 0, root, -root), root", "root, root",
     "factors.roots_of_the_weights_alone", ()),
    ("peft_cat", "factors", "jnp.ones_like(weights) if scales is None else scales",
     "jnp.ones_like(weights)", "factors.cat_is_exact", ()),
    ("peft_magnitude_prune", "factors", "[:, -1:]", "[:, :1]", "factors.magnitude_prune",
     ()),
    ("peft_ties", "factors", "jnp.maximum(_sum(agree), 1.0)", "jnp.ones_like(tally)",
     "factors.ties", ("total",)),
    ("peft_dare_linear", "factors", "jnp.asarray(density, x.dtype)", "jnp.ones((), x.dtype)",
     "factors.dare", ()),
    ("peft_dare_ties", "factors", "tally >= 0", "tally < 0", "factors.dare", ()),
    ("peft_svd", "svd", "truncated(bank, weights,", "truncated(bank, jnp.abs(weights),",
     "svd.svd", ()),
    ("peft_magnitude_prune_svd", "svd", "weighted(trim(d, numbers), weights)",
     "weighted(d, weights)", "svd.magnitude_prune", ()),
    ("peft_ties_svd", "svd", "/ number", "", "svd.ties", ("total",)),
    ("peft_dare_linear_svd", "svd", "d * masks[:, numbers] / p", "d * masks[:, numbers]",
     "svd.dare", ()),
    ("peft_dare_ties_svd", "svd", "tally >= 0", "tally < 0", "svd.dare", ()),
    # --- systems ---
    ("do_merging", "do_merging", " + gamma * (c - eye)", "",
     "do_merging.descent_by_numpy_on_dense_deltas", ()),
    ("do_decoupled", "do_merging", "merged[None, :] / jnp.where(live, m, 1.0)", "merged[None, :]",
     "do_merging.decoupling_by_numpy", ("W",)),
    ("lego", "lego", "gain * jnp.sqrt(", "gain + 0 * jnp.sqrt(", "lego.value_by_numpy", (1,)),
    ("lego", "lego", "centre * length / _safe(_length(centre, norm))", "centre",
     "lego.value_by_numpy", (2,)),
    ("lego_spectral", "lego", "u * sign * root", "u * root", "lego.spectral_value_by_numpy", ()),
    ("lion", "lion", "weights * mean * scale", "weights * mean", "lion.value_by_numpy", (None,)),
    ("lion_orthogonal", "lion", "weights, orthogonal=True", "weights, orthogonal=False",
     "lion.orthogonal_fusion_by_numpy_and_linear_scale", ()),
    ("lion_orthogonal", "lion", "vectors / jnp.sqrt(", "vectors * jnp.sqrt(",
     "lion.orthogonal_fusion_by_numpy_and_linear_scale", ()),
    ("factor_mix", "lorahub", '"n,nro->ro", weights', '"n,nro->ro", jnp.ones_like(weights)',
     "lorahub.factor_mix_by_numpy_and_its_cross_terms", ()),
    ("LoraHub", "coefficients", "jnp.mean(jnp.abs(flat))", "jnp.mean(flat)",
     "lorahub.objective_by_numpy", ()),
    ("LoraHub", "lorahub", "penalised(loss, gathered, l1, fn)", "penalised(loss, gathered, 1, fn)",
     "lorahub.search_keeps_the_best_it_has_seen", ()),
    ("LoraHub by gradient", "lorahub", "gathered.weights, batches, rate=rate, l1=l1",
     "gathered.weights, batches, rate=rate", "lorahub.descent_by_numpy", ()),
    ("CMA-ES", "cma", "mean + s * move", "mean - s * move",
     "lorahub.cma_finds_the_bottom_of_a_narrow_valley", ()),
    ("CMA-ES", "cma", "+ cmu * spread", "", "lorahub.cma_by_numpy_in_one_dimension", ()),
    ("Coefficients by gradient", "coefficients", "value + l1 *", "value - l1 *",
     "coefficients.gradient_by_finite_differences_and_by_dense_merging", ()),
    ("AdaMerging", "adamerging", "return -jnp.mean(", "return jnp.mean(",
     "adamerging.entropy_by_numpy", ()),
    ("PSEC", "psec", "(h * gate)", "h", "psec.every_row_has_its_own_merged_weight", ()),
    ("AutoLoRA: retrieval", "weight_encoder", "_norm(seen)", "seen",
     "weight_encoder.tokens_by_numpy", ()),
    ("AutoLoRA: retrieval", "weight_encoder", "math.sqrt(width // heads)", "1.0",
     "weight_encoder.embedding_by_numpy", ()),
    ("AutoLoRA: gated fusion", "gated_fusion", ' + w["both"] * base * own', "",
     "weight_encoder.gate_by_numpy", ()),
    ("LoRA Composite", "composite", "return base + jnp", "return jnp",
     "composite.the_weighted_mean_of_predictions_by_numpy", ()),
    ("LoRA Switch", "composite", "// stay", "// 1", "composite.turns_by_hand", ()),
    ("LCM-LoRA arithmetic", "lcm_arithmetic", "[*strengths, strength]", "[strength, *strengths]",
     "lcm_arithmetic.value_by_dense_matrices_where_sites_differ", ()),
    # --- around them ---
    ("Safe spectral functions", "spectral_functions", "g_plus * (a - a.T)", "g_minus * (a - a.T)",
     "spectral_functions.derivative_is_that_of_differences", ("distinct", False)),
    ("Conversion to LoRA", "convert", "after - m.astype(after.dtype)", "after",
     "convert.a_bank_of_unfactored_adapters", ("base",)),
    ("Conversion to LoRA", "convert", "(1.0 - share) * tail", "share * tail",
     "convert.ranks_by_energy_and_error_by_hand", ()),
    ("Interference diagnostics", "diagnostics", "jnp.minimum(rank", "jnp.maximum(rank",
     "diagnostics.overlap_by_numpy", D),
    ("Interference diagnostics", "diagnostics", "jnp.abs(jnp.sum(d, axis=0))", "jnp.sum(d, axis=0)",
     "diagnostics.signs_by_numpy", (8, *D)),
    ("Duplicates, clusters and retrieval in a bank", "banks",
     "(size[i] * link[i] + size[j] * link[j]) / (size[i] + size[j])", "(link[i] + link[j]) / 2",
     "banks.clusters_are_those_of_scipy", ()),
]  # fmt: skip


@pytest.fixture(autouse=True)
def uncached():
    """Compiled programs know nothing of the broken piece, or of nothing else."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    ("system", "module", "right", "wrong", "test", "args"),
    BROKEN,
    ids=[f"{row[0]}-{row[4].split('.')[1]}" for row in BROKEN],
)
def test_a_broken_piece_is_noticed(monkeypatch, request, system, module, right, wrong, test, args):
    file, name = test.split(".")
    tests = load(file, *ROOMS)
    made = {"base": lambda: tests.weights(), "W": lambda: tests.W}
    made |= {name: functools.partial(request.getfixturevalue, name) for name in D}
    args = [made[a]() if isinstance(a, str) and a in made else a for a in args]
    broken(monkeypatch, module_of(module, *ROOMS), right, wrong)
    with pytest.raises(AssertionError):
        getattr(tests, f"test_{name}")(*args)


def test_every_system_has_a_broken_piece():
    others = {p.system.name for p in registry.systems() if p.family in ROOMS}
    assert {row[0] for row in BROKEN} == METHODS.keys() | others
