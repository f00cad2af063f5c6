"""The tests of aggregations can fail: in each a piece is broken, and one of its tests notices."""

import jax
import pytest

from jlora import registry
from tests.mutants import broken, load

F, C = "jlora.federated", "clients"  # a fixture of `conftest`

# (module, its piece, what it becomes, a test, its arguments)
BROKEN = [
    (f"{F}.fedavg", "weights.astype(x.dtype)", "jnp.ones(x.shape[0], x.dtype)",
     "fedavg.fedavg_by_numpy_is_not_the_average", (C,)),
    (f"{F}.fedavg", "/ jnp.sum(counts)", "/ jnp.max(counts)", "fedavg.shares_are_of_examples", ()),
    (f"{F}.flora", "concat(bank, weights)", "concat(bank, weights * weights)",
     "flora.flora_is_exact_for_any_ranks_and_fedavg_is_not", (C,)),
    (f"{F}.fedex", "-mean.u", "mean.u",
     "fedex.fedex_is_exact_and_its_residual_is_what_fedavg_loses", (C,)),
    (f"{F}.ffa", "weighted(weights, bank.v)", "bank.v[0]",
     "ffa.ffa_is_exact_with_one_frozen_factor", (C,)),
    (f"{F}.flexlora", "concat(bank, weights)}, max(ranks)", "concat(bank, weights)}, min(ranks)",
     "flexlora.flexlora_gives_each_client_the_best_of_its_rank", (C,)),
    (f"{F}.flexlora", "< jnp.asarray(ranks)", "<= jnp.asarray(ranks)",
     "flexlora.flexlora_gives_each_client_the_best_of_its_rank", (C,)),
    (f"{F}.hetlora", "jnp.where(jnp.any(live), norms, jnp.ones_like(norms))",
     "jnp.ones_like(norms)", "hetlora.value_by_numpy", (C,)),
    (f"{F}.hetlora", "squared = u * v", "squared = u + v", "hetlora.self_pruning_follows_the_tail",
     (C,)),
    (f"{F}.lora_fair", "return LowRank(u, v + c)", "return LowRank(u, v - c)",
     "lora_fair.closed_form_is_stationary_by_numpy", (C,)),
    (f"{F}.lora_fair", "c - step * jax.grad", "c + step * jax.grad",
     "lora_fair.cosine_rises_to_that_of_the_closed_form_and_scale_is_free", (C,)),
    (f"{F}.lora_fair", "1.0 - by / norm", "1.0", "lora_fair.cosine_descent_by_numpy", (C,)),
    (f"{F}.fed_sb", "weighted(weights, cores)", "jnp.mean(cores, axis=0)",
     "fed_sb.fed_sb_bases_cores_and_average", ()),
    (f"{F}.fed_sb", "jnp.sign(gradient)", "gradient", "fed_sb.fed_sb_bases_cores_and_average", ()),
    ("jlora.schedules.squeeze", "m**power", "m",
     "squeeze.second_moments_are_those_of_independent_entries", ()),
    ("jlora.schedules.squeeze", "matmul(ra.mT, u) * over", "matmul(ra.mT, u) * root",
     "squeeze.error_is_the_tail_of_the_spectrum", ("w",)),
    ("jlora.schedules.squeeze", "(target - source) * done", "(target - source)",
     "squeeze.schedule", ()),
]  # fmt: skip


@pytest.fixture(autouse=True)
def uncached():
    """Compiled programs know nothing of the broken piece, or of nothing else."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    ("module", "right", "wrong", "test", "args"), BROKEN, ids=[f"{r[3]}-{r[1]}" for r in BROKEN]
)
def test_a_broken_piece_is_noticed(monkeypatch, request, module, right, wrong, test, args):
    file, name = test.split(".")
    tests = load(file, "federated", "schedules")
    args = [request.getfixturevalue(C) if a == C else a for a in args]
    broken(monkeypatch, module, right, wrong)
    with pytest.raises(AssertionError):
        getattr(tests, f"test_{name}")(*args)


def test_every_system_has_a_broken_piece():
    rows = {p.module for p in registry.systems() if p.family in ("federated", "schedules")}
    assert {row[0] for row in BROKEN} == rows
