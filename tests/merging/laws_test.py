"""Every row keeps every law, or breaks it as it says; doubles that break a law fail."""

import jax
import jax.numpy as jnp
import pytest

from jlora.core.algebra import LowRank
from jlora.merging import METHODS, Merging
from jlora.merging.concat import concat
from jlora.merging.laws import CHECKS, error, laws_of
from jlora.merging.table import LAWS, ROWS
from jlora.merging.truncated import truncated

CASES = [(name, law) for name, row in METHODS.items() for law in laws_of(row)]


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Hundreds of tiny programs: what they compute is tested, not how fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def check(law, row, world):
    got = error(law, row, world)
    if law in row.breaks:
        assert got > 10 * row.atol, f"{row.name} says it breaks {law}: {row.breaks[law]}; {got}"
    else:
        assert got <= row.atol, f"{row.name} breaks {law}: {got}"


@pytest.mark.parametrize("name, law", CASES, ids=lambda c: c)
def test_law(name, law, world):
    check(law, METHODS[name], world)


def test_table():
    assert len(METHODS) == len(ROWS), "two rows of one name"
    assert set(LAWS) == set(CHECKS)
    for row in ROWS:
        assert all(row.breaks.values()), f"{row.name}: a law is broken for no reason"


def twice(bank, weights):
    return concat(bank, 2 * weights)


def shrunk(bank, weights):
    """Right for one adapter, wrong for equal ones."""
    return concat(bank, weights / bank.u.shape[0])


def first(bank, weights):
    return LowRank(bank.u[0], bank.v[0])


def factor_space(bank, weights):
    """The factors averaged apart: depends on their gauge."""
    return LowRank(*(jnp.einsum("n,nij->ij", weights, t, precision="highest") for t in bank))


def forgetful():
    """Another result each time it is traced."""
    calls = []

    def double(bank, weights):
        calls.append(1)
        return concat(bank, weights * len(calls))

    return double


def too_small(bank, weights, rank):
    return jnp.zeros(())


def rough(bank, weights):
    """Infinite derivative."""
    return concat(bank, weights + jnp.sqrt(jnp.abs(weights - weights)))


def dense(bank, weights):
    """The delta itself."""
    total = jnp.einsum("n,nir,nro->io", weights, *bank)
    return LowRank(total, jnp.eye(total.shape[1], dtype=total.dtype))


DOUBLES = {
    "weight_one": Merging("double", twice, ""),
    "idempotent": Merging("double", shrunk, ""),
    "permutation": Merging("double", first, ""),
    "gauge": Merging("double", factor_space, ""),
    "certificate": Merging("double", truncated, "", options={"rank": 2}, certificate=too_small),
    "jit": Merging("double", forgetful(), ""),
    "sharded": Merging("double", forgetful(), ""),
    "gradient": Merging("double", rough, ""),
    "memory": Merging("double", dense, ""),
}


@pytest.mark.parametrize("law", DOUBLES)
def test_a_double_that_breaks_a_law_fails(law, world):
    with pytest.raises(AssertionError, match=f"breaks {law}"):
        check(law, DOUBLES[law], world)


@pytest.mark.parametrize("law", DOUBLES)
def test_a_row_that_names_a_law_it_keeps_fails(law, world):
    row = Merging("double", concat, "", breaks={law: "no reason"}, certificate=None)
    if law == "certificate":
        row = METHODS["truncated"]
        row = Merging("double", row.function, "", options=row.options, certificate=row.certificate,
                      breaks={law: "no reason"})  # fmt: skip
    with pytest.raises(AssertionError, match="says it breaks"):
        check(law, row, world)
