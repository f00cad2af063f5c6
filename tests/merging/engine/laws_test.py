"""Every row keeps every law on adapters of every type, or breaks it as it says; doubles fail."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora import registry
from jlora.algebra import LowRank
from jlora.merging import METHODS
from jlora.merging.engine import laws
from jlora.merging.engine.laws import CHECKS, error, errors, laws_of
from jlora.merging.engine.record import HELD, LAWS, Merging
from jlora.merging.engine.table import ROWS
from jlora.merging.exact.concat import concat
from jlora.merging.exact.truncated import truncated


def double(function, **fields):
    """A method that is not in the table."""
    text = {"name": "double", "paper": "-", "symbol": "-", "evidence": "-"}
    return Merging(**{**text, **fields}, function=function)


TYPES = {  # alongside those of `conftest.TYPES`; those that need the weight are made LoRA first
    "vera": jl.VeRA(4),
    "pissa": jl.PiSSA(2),
    "adalora": jl.AdaLoRA(4),
    "dora": jl.DoRA(2),
    "oft": jl.OFT(block=4),
    "boft": jl.BOFT(block=4),
    "ia3": jl.IA3("out"),
    "hira": jl.HiRA(2),
    "conv": jl.LoRA(4),
    "conv_dora": jl.DoRA(2),
    "conv_core": jl.LoCon(4),
    "embedding": jl.LoRA(4),
    "weight_decomposed": jl.Decomposed(jl.LoHa(2)),
}
KERNEL = (2, 2, 2, 12)  # of a convolution: its matrix is [8, 12]


def model(p, x):
    """x [1, 8]; every site is an [8, 12] matrix."""
    for name in TYPES:
        if name.startswith("conv"):
            image = x.reshape(1, 2, 2, 2)
            y = jax.lax.conv_general_dilated(
                image, p[name], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = y.reshape(1, 12)[:, :8]
        elif name == "embedding":
            x = x + jnp.take(p[name], jnp.array([3]), axis=0)[:, :8]
        else:
            x = (x @ p[name])[:, :8]
    return x


@pytest.fixture(scope="module")
def world(world):
    """The adapters of `conftest`, and one site of every other type."""
    rng, x = np.random.default_rng(5), jnp.ones((1, 8))
    shapes = {name: KERNEL if name.startswith("conv") else (8, 12) for name in TYPES}
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}

    def one(k):
        chosen = {f"^{name}$": method for name, method in TYPES.items()}
        a = jl.init(jax.random.key(k), model, params, x, methods=chosen)
        move = lambda t: t + jnp.asarray(rng.normal(size=t.shape), t.dtype)  # noqa: E731
        a = a.replace(trainable=jax.tree.map(move, a.trainable))
        return jl.merging.to_lora(a, params, rank=4).adapter

    return world._replace(bank=world.bank | jl.merging.gather([one(k) for k in range(3)]).bank)


CASES = [(name, law) for name, row in METHODS.items() for law in laws_of(row)]


def check(law, row, world):
    got = error(law, row, world)
    if law in row.breaks:
        assert got > 10 * row.atol, f"{row.name} says it breaks {law}: {row.breaks[law]}; {got}"
    else:
        assert got <= row.atol, f"{row.name} breaks {law}: {got}"


@pytest.mark.parametrize("name, law", CASES, ids=lambda c: c)
def test_law(name, law, world):
    check(law, METHODS[name], world)


USED = {type(m).__name__ for m in TYPES.values()} | {"LoRA", "LoHa", "LoKr"}
NO_MERGE = {n for n, s in registry.methods().items() if "L3" in s.breaks}
NO_DELTA = {"TrainableTokens", "BEFT", "BitFit", "LNTuning"}  # rows of a table, vectors


def test_the_laws_see_the_types_and_a_merge_wrong_everywhere(world):
    """One shape, so that the laws compile one program."""
    assert {low.u.shape[-2:] + low.v.shape[-1:] for low in world.bank.values()} == {(8, 4, 12)}
    assert USED | NO_MERGE | NO_DELTA <= set(registry.methods())
    per_site = errors("weight_one", double(twice), world)
    assert per_site.keys() == world.bank.keys()
    np.testing.assert_allclose(list(per_site.values()), 1 / np.sqrt(3), atol=0.5)


def test_methods_that_the_laws_do_not_use_merge_as_the_lora_that_they_are():
    """What merges see of them is a LoRA adapter: it has the delta of `jl.merge`."""
    others = set(registry.methods()) - USED - NO_MERGE - NO_DELTA
    methods = {name: registry.methods()[name].examples[0] for name in sorted(others)}
    assert {type(m).__name__ for m in methods.values()} == others
    rng = np.random.default_rng(6)
    params = {name: jnp.asarray(rng.normal(size=(8, 12)), jnp.float32) for name in methods}

    def chain(p, x):
        for name in methods:
            x = (x @ p[name])[:, :8]
        return x

    chosen = {f"^{name}$": method for name, method in methods.items()}
    # In one program each: one of every operation is eight hundred of them.
    start = jax.jit(lambda key: jl.init(key, chain, params, jnp.ones((1, 8)), methods=chosen))
    a = start(jax.random.key(0))
    move = lambda t: t + np.asarray(0.3 * rng.normal(size=t.shape), t.dtype)  # noqa: E731
    a = a.replace(trainable=jax.tree.map(lambda t: move(np.asarray(t)), a.trainable))
    got = jax.jit(lambda a: jl.delta(params, jl.merging.to_lora(a, params).adapter))(a)
    for name, want in jax.jit(lambda a: jl.delta(params, a))(a).items():
        assert float(jnp.abs(want).max()) > 0.05, name
        np.testing.assert_allclose(got[name], want, atol=1e-5, err_msg=name)


def test_mutation_one_wrong_type_is_seen(world):
    """A merge that is wrong at a single small site."""
    small = {p: LowRank(d.u * (1e-6 if p == "ia3" else 1.0), d.v) for p, d in world.bank.items()}

    def wrong(bank, weights):
        keep = (jnp.max(jnp.abs(bank.u)) > 1e-3).astype(weights.dtype)
        return concat(bank, weights * keep)

    with pytest.raises(AssertionError, match="breaks weight_one"):
        check("weight_one", double(wrong), world._replace(bank=small))


def test_held_bases_concern_factors_alone(world):
    """Rows that hold singular bases are exact by the weights, which learned merges rely on."""
    rows = [row for row in ROWS if row.breaks.get("difference") == HELD]
    assert rows
    for row in rows:
        every = errors("difference", row, world)
        by = {what: max(v for k, v in every.items() if k.startswith(what)) for what in
              ("factors", "weights")}  # fmt: skip
        assert by["weights"] <= row.atol < by["factors"], (row.name, by)


def test_without_a_cut_peft_svd_merges_have_derivatives(world):
    """They break `difference` by the rank they cut to, and by nothing else."""
    row = METHODS["peft_ties_svd"]
    whole = dataclasses.replace(row, options={**row.options, "rank": 8}, breaks={})
    check("difference", whole, world)


def slightly(bank, weights):
    """A custom gradient 2 % too large, of the second factor."""

    @jax.custom_jvp
    def steeper(v):
        return v

    steeper.defjvp(lambda primals, tangents: (primals[0], 1.02 * tangents[0]))
    return concat(LowRank(bank.u, steeper(bank.v)), weights)


def held_norm(bank, weights):
    """Divided by its own norm, which is held."""
    made = concat(bank, weights)
    size = jnp.sqrt(jnp.sum((made.u @ made.v) ** 2))
    return LowRank(made.u / jax.lax.stop_gradient(size), made.v)


def at_one_site(bank, weights):
    """Too small a slope where the first element is the largest of its column, right elsewhere."""
    hit = jnp.argmax(jnp.abs(bank.u[0, :, 0])) == 0
    half = (weights + jax.lax.stop_gradient(weights)) / 2
    return concat(bank, jnp.where(hit, half, weights))


@pytest.mark.parametrize("wrong", [slightly, held_norm, at_one_site])
def test_wrong_gradients_of_right_values_fail(wrong, world):
    """Finite, not zero, and not the derivative."""
    row = double(wrong)
    assert error("gradient", row, world) == 0
    with pytest.raises(AssertionError, match="breaks difference"):
        check("difference", row, world)


def test_mutation_a_scale_rounded_to_the_dtype_of_its_adapter_is_seen(world, monkeypatch):
    monkeypatch.setattr(jl.LoRA, "prepare", lambda self, p: p)
    with pytest.raises(AssertionError, match="breaks dtypes"):
        check("dtypes", METHODS["concat"], world)


def test_refusing_signs_is_a_law_kept_and_not_refusing_is_seen(world):
    """A row that says it has no signs passes by its refusal alone."""
    for law in ("minus_one", "signs", "bounded"):
        check(law, double(unsigned, signed=False), world)
        with pytest.raises(AssertionError, match=f"breaks {law}"):
            check(law, double(by_the_sum if law == "bounded" else unsigned), world)


def test_mutation_a_bank_read_in_another_order_is_seen(world, monkeypatch):
    real = laws.gather

    def wrong(adapters, weights):
        given = real(adapters, weights)
        turned = jax.tree.map(lambda t: t[::-1], given.bank)
        return given if isinstance(adapters, list) else given._replace(bank=turned)

    monkeypatch.setattr(laws, "gather", wrong)
    with pytest.raises(AssertionError, match="breaks bank"):
        check("bank", METHODS["concat"], world)


def everything(bank, weights):
    """A merge of all sites at once, by their common norm."""
    total = jnp.sqrt(sum(jnp.sum(u * u) for u, _ in bank.values()))
    return {p: concat(LowRank(u / total, v), weights) for p, (u, v) in bank.items()}


def everything_held(bank, weights):
    return everything(bank, jax.lax.stop_gradient(weights))


def test_merges_of_all_sites_at_once(world):
    bank = {p: world.bank[p] for p in ("lora", "mixed")}
    small = world._replace(bank=bank)
    check("difference", double(everything, scope="adapter"), small)
    with pytest.raises(AssertionError, match="breaks gradient"):
        check("gradient", double(everything_held, scope="adapter"), small)
    with pytest.raises(AssertionError, match="breaks difference"):
        check("difference", double(everything_held, scope="adapter"), small)


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


def unsigned(bank, weights):
    """The sign is lost."""
    return concat(bank, jnp.abs(weights))


def by_the_sum(bank, weights):
    """A mean whose divisor is the sum of the weights."""
    return concat(bank, weights / jnp.sum(weights))


def crowded(bank, weights):
    """All adapters count, also those of weight 0."""
    return concat(bank, weights + 0.01)


def too_small(bank, weights, rank):
    return jnp.zeros(())


def held(bank, weights):
    """The weights' slope is a tenth of what it is."""
    small = 0.1 * (weights - jax.lax.stop_gradient(weights))
    return concat(bank, jax.lax.stop_gradient(weights) + small)


def rough(bank, weights):
    """Infinite derivative."""
    return concat(bank, weights + jnp.sqrt(jnp.abs(weights - weights)))


def dense(bank, weights):
    """The delta itself."""
    total = jnp.einsum("n,nir,nro->io", weights, *bank)
    return LowRank(total, jnp.eye(total.shape[1], dtype=total.dtype))


def narrow(bank, weights):
    """Right numbers, in half of their bits."""
    return LowRank(*(t.astype(jnp.bfloat16) for t in concat(bank, weights)))


DOUBLES = {
    "weight_one": double(twice),
    "minus_one": double(unsigned),
    "signs": double(by_the_sum),
    "absent": double(crowded),
    "bounded": double(by_the_sum),
    "idempotent": double(shrunk),
    "permutation": double(first),
    "gauge": double(factor_space),
    "certificate": double(truncated, options={"rank": 2}, certificate=too_small),
    "jit": double(forgetful()),
    "sharded": double(forgetful()),
    "gradient": double(rough),
    "difference": double(held),
    "memory": double(dense),
    "dtypes": double(narrow),
}


@pytest.mark.parametrize("law", DOUBLES)
def test_a_double_that_breaks_a_law_fails(law, world):
    with pytest.raises(AssertionError, match=f"breaks {law}"):
        check(law, DOUBLES[law], world)


@pytest.mark.parametrize("law", DOUBLES)
def test_a_row_that_names_a_law_it_keeps_fails(law, world):
    row = double(concat, breaks={law: "no reason"}, certificate=None)
    if law == "certificate":
        row = METHODS["truncated"]
        row = double(row.function, options=row.options, certificate=row.certificate,
                      breaks={law: "no reason"})  # fmt: skip
    with pytest.raises(AssertionError, match="says it breaks"):
        check(law, row, world)
