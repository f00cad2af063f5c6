"""The tests of aggregations can fail: in each a piece is broken, and one of its tests notices."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jlora import registry
from jlora.algebra import LowRank
from jlora.federated.fedavg import fedavg
from tests.doubles import broken, given, instead, load, names, options, returns

ROOT = Path(__file__).parents[2]
F, C = "jlora.federated", "clients"  # a fixture of `conftest`
SQUEEZE = "jlora.schedules.squeeze"


def residual_turned(out, bank, weights):
    """The mean is added where it has to be taken away."""
    r = out.mean.u.shape[1]
    return out._replace(residual=LowRank(out.residual.u.at[:, -r:].multiply(-1.0), out.residual.v))


def correction_turned(out, bank, weights):
    return LowRank(out.u, 2 * fedavg(bank, weights).v - out.v)


def sum_of_squares(x, keep):
    return jnp.sqrt(jnp.sum(x.u[:, keep:] ** 2) + jnp.sum(x.v[keep:] ** 2))


def at_once(step, *, start, stop, source, target):
    return jnp.int32(target)


# (module, its piece, how it is wrong, a test, its arguments)
BROKEN = [
    (f"{F}.fedavg", "weighted", given(lambda w, x: (jnp.ones_like(w), x)),
     "fedavg.fedavg_by_numpy_is_not_the_average", (C,)),
    (f"{F}.fedavg", "shares", instead(lambda counts: counts / jnp.max(counts)),
     "fedavg.shares_are_of_examples", ()),
    (f"{F}.flora", "concat", given(lambda bank, w: (bank, w * w)),
     "flora.flora_is_exact_for_any_ranks_and_fedavg_is_not", (C,)),
    (f"{F}.fedex", "fedex", returns(residual_turned),
     "fedex.fedex_is_exact_and_its_residual_is_what_fedavg_loses", (C,)),
    (f"{F}.ffa", "weighted", instead(lambda w, x: x[0]),
     "ffa.ffa_is_exact_with_one_frozen_factor", (C,)),
    (f"{F}.flexlora", "max", instead(min),
     "flexlora.flexlora_gives_each_client_the_best_of_its_rank", (C,)),
    (f"{F}.flexlora", "cut", given(lambda x, ranks: (x, [r + 1 for r in ranks])),
     "flexlora.flexlora_gives_each_client_the_best_of_its_rank", (C,)),
    (f"{F}.hetlora", "norm_weights", instead(lambda bank, w: w / jnp.sum(w)),
     "hetlora.value_by_numpy", (C,)),
    (f"{F}.hetlora", "tail", instead(sum_of_squares), "hetlora.self_pruning_follows_the_tail",
     (C,)),
    (f"{F}.lora_fair", "lora_fair", returns(correction_turned),
     "lora_fair.closed_form_is_stationary_by_numpy", (C,)),
    (f"{F}.lora_fair", "lora_fair", options(rate=-0.5),
     "lora_fair.cosine_rises_to_that_of_the_closed_form_and_scale_is_free", (C,)),
    (f"{F}.lora_fair", "_shrink", instead(lambda z, by: z),
     "lora_fair.cosine_descent_by_numpy", (C,)),
    (f"{F}.fed_sb", "weighted", instead(lambda w, x: jnp.mean(x, axis=0)),
     "fed_sb.fed_sb_bases_cores_and_average", ()),
    (f"{F}.fed_sb", "jnp", names(sign=lambda x: x), "fed_sb.fed_sb_bases_cores_and_average", ()),
    (SQUEEZE, "_project", given(lambda t, maps, power: (t, maps, 1)),
     "squeeze.second_moments_are_those_of_independent_entries", ()),
    (SQUEEZE, "_pair", returns(lambda out, *_: (*out[:2], out[2]._replace(onto=2 * out[2].onto),
                                                out[3])),
     "squeeze.error_is_the_tail_of_the_spectrum", ("w",)),
    (SQUEEZE, "schedule", instead(at_once), "squeeze.schedule", ()),
]  # fmt: skip


@pytest.fixture(autouse=True)
def uncached():
    """Compiled programs know nothing of the broken piece, or of nothing else."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    ("module", "piece", "change", "test", "args"), BROKEN, ids=[f"{r[3]}-{r[1]}" for r in BROKEN]
)
def test_a_broken_piece_is_noticed(monkeypatch, request, module, piece, change, test, args):
    file, name = test.split(".")
    tests = load(file, "federated", "schedules")
    args = [request.getfixturevalue(C) if a == C else a for a in args]
    broken(monkeypatch, module, piece, change, tests)
    with pytest.raises(AssertionError):
        getattr(tests, f"test_{name}")(*args)


def test_every_system_has_a_broken_piece():
    """Here, or in its own test file."""
    rows = {
        p.module: p.tests[0] for p in registry.systems() if p.family in ("federated", "schedules")
    }
    own = {m for m, file in rows.items() if "def test_mutation" in (ROOT / file).read_text()}
    assert {row[0] for row in BROKEN} | own == rows.keys()


def test_a_piece_that_is_not_there_cannot_be_broken(monkeypatch):
    with pytest.raises(AttributeError, match="nothing"):
        broken(monkeypatch, f"{F}.fedavg", "nothing", instead(0))
