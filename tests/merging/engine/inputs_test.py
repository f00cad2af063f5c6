"""Reading adapters into a bank and writing them back; every refusal."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.algebra import LowRank
from jlora.merging import gather, per_site, to_adapter
from jlora.merging.engine.inputs import keys_of
from jlora.merging.exact.concat import concat


def test_a_bank_holds_every_delta(params, adapters):
    bank, weights, sites = gather(adapters)
    np.testing.assert_allclose(weights, [1 / 3] * 3, rtol=1e-6)
    assert [s.path for s in sites] == sorted(params) == list(bank)
    for k, a in enumerate(adapters):
        for path, want in jl.delta(params, a).items():
            low = bank[path]
            np.testing.assert_allclose(low.u[k] @ low.v[k], want, atol=2e-5)
    assert bank["mixed"].u.shape == (3, 8, 4) and bank["stacked"].v.shape == (3, 2, 4, 12)


def test_a_stacked_bank_is_a_list(adapters):
    only = [drop(a, "loha") for a in adapters]
    one, many = gather(jl.stack(only)), gather(only)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), one.bank, many.bank)


def drop(a, *keep):
    """The adapter on some of its sites."""
    return jl.Adapter(
        {p: a.trainable[p] for p in keep},
        {p: a.frozen[p] for p in keep if p in a.frozen},
        tuple((s, m) for s, m in a.sites if s.path in keep),
    )


def test_shared_tensors_are_read_and_the_result_is_plain():
    params, x = {"w": jnp.ones((4, 4))}, jnp.ones((1, 4))
    made = [
        jl.init(jax.random.key(k), lambda p, x: x @ p["w"], params, x, methods={"w": jl.VeRA(3)})
        for k in range(2)
    ]
    made = [a.replace(trainable=jax.tree.map(lambda t: t + 1.0, a.trainable)) for a in made]
    merged = jl.merging.merge("concat", made, np.array([0.5, 0.5], np.float32))
    assert merged.sites[0][0].group == "" and set(merged.trainable) == {"w"}
    np.testing.assert_allclose(
        jl.merge(params, merged)["w"], jl.merge(params, made[0])["w"], rtol=1e-5
    )


def test_missing_sites_are_zero_on_request(adapters):
    some = [drop(adapters[0], "lora", "loha"), drop(adapters[1], "lora")]
    with pytest.raises(ValueError, match="adapter 1: got no site loha"):
        gather(some)
    bank = gather(some, missing="zero").bank
    assert float(jnp.abs(bank["loha"].u[1]).max()) == 0 and list(bank) == ["loha", "lora"]


def test_per_site_folds_keys_by_path_slice_and_adapter(world):
    """The same keys whatever the other sites, the order, or the loop."""

    def noise(bank, weights, keys):
        draw = jax.vmap(lambda k: jax.random.normal(k, ()))(keys)
        return concat(bank, draw.astype(weights.dtype))

    run = per_site(noise, randomised=True)
    key, w = world.key, world.weights
    all_sites = run(world.bank, w, key)
    one = run({"stacked": world.bank["stacked"]}, w, key)
    mapped = per_site(noise, randomised=True, loop="map")(world.bank, w, key)
    np.testing.assert_array_equal(all_sites["stacked"].u, one["stacked"].u)
    np.testing.assert_allclose(all_sites["loha"].u, mapped["loha"].u, rtol=1e-6)
    scale = [np.asarray(all_sites[p].u / concat_ones(world.bank[p]).u) for p in ("lora", "loha")]
    assert not np.allclose(scale[0][0, 0], scale[1][0, 0])
    keys = keys_of(key, "stacked", 2, 3)
    flat = jax.random.key_data(keys).reshape(6, -1)
    assert len({tuple(k) for k in flat.tolist()}) == 6
    by_id = keys_of(key, "stacked", 2, 2, ids=np.array([2, 0]))
    np.testing.assert_array_equal(
        jax.random.key_data(by_id), jax.random.key_data(keys[:, np.array([2, 0])])
    )


def test_a_mapped_loop_holds_one_slice_at_a_time(world):
    """What `loop` is for: a loop in the program, or none."""

    def loops(**options):
        made = jax.make_jaxpr(lambda b: per_site(concat, **options)(b, world.weights))(world.bank)
        return "scan" in {e.primitive.name for e in made.jaxpr.eqns}

    assert loops(loop="map") and not loops(loop="vmap") and not loops()


def concat_ones(low):
    return concat(low, jnp.ones(low.u.shape[0]))


def test_weights_of_sites_and_layers(world, adapters):
    """{path: [N, *stack]}: each layer its own weights."""
    rng = np.random.default_rng(0)
    w = {p: jnp.asarray(rng.normal(size=(3,)), jnp.float32) for p in world.bank}
    w["stacked"] = jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)
    bank, weights, _ = gather(adapters, w)
    out = per_site(concat)(bank, weights)
    for layer in range(2):
        low = LowRank(*(t[:, layer] for t in bank["stacked"]))
        want = concat(low, w["stacked"][:, layer])
        np.testing.assert_allclose(out["stacked"].u[layer] @ out["stacked"].v[layer],
                                   want.u @ want.v, atol=1e-4)  # fmt: skip
    want = concat(bank["loha"], w["loha"])
    np.testing.assert_allclose(out["loha"].u, want.u, rtol=1e-6)


def test_to_adapter_is_plain_lora_and_makes_banks(params, adapters):
    bank, _, sites = gather(adapters)
    back = to_adapter(bank, sites)
    assert all(isinstance(m, jl.LoRA) for _, m in back.sites)
    for k, a in enumerate(adapters):
        for path, want in jl.delta(params, a).items():
            np.testing.assert_allclose(jl.delta(params, back[k])[path], want, atol=2e-5)


def changed(a, path="lora", **site):
    new = tuple(
        (dataclasses.replace(s, **site), m) if s.path == path else (s, m) for s, m in a.sites
    )
    return a.replace(sites=new)


def nan(a):
    bad = jax.tree.map(lambda t: t.at[(0,) * t.ndim].set(jnp.nan), a.trainable["loha"])
    return a.replace(trainable={**a.trainable, "loha": bad})


REFUSALS = {
    "no adapters": (lambda a: ([], None), "adapters: got none"),
    "one adapter": (lambda a: (a[0], None), "expected a list of adapters, or a bank"),
    "shape": (lambda a: ([a[0], changed(a[1], shape=(9, 12))], None), "adapter 1: "),
    "base": (lambda a: ([a[0], changed(a[1], dtype=jnp.dtype("bfloat16"))], None), "other bases"),
    "site": (lambda a: ([a[0], drop(a[1], "lora")], None), "adapter 1: got no site loha"),
    "nan": (lambda a: ([a[0], nan(a[1])], None), "adapter 1: loha: got nan or inf"),
    "length": (lambda a: (a, [0.5, 0.5]), r"weights: got shape \(2,\), expected one for each of 3"),
    "weight nan": (lambda a: (a, [0.5, 0.5, np.nan]), "weights: got nan or inf"),
    "integers": (lambda a: (a, np.array([1, 2, 3])), "weights: got int"),
    "weights of an unknown site": (
        lambda a: (a, {**{s.path: [1.0, 1.0, 1.0] for s, _ in a[0].sites}, "x": [1.0]}),
        "weights: x: expected exactly the sites",
    ),
    "weights of too few sites": (
        lambda a: (a, {"loha": [1.0, 1.0, 1.0]}),
        "expected exactly the sites",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name, adapters):
    build, text = REFUSALS[name]
    with pytest.raises(ValueError, match=text):
        gather(*build(adapters))


@pytest.mark.parametrize(
    "method, text",
    [
        (jl.DoRA(2), "adapter 0: w: got DoRA, expected a method with a factored delta"),
        (jl.IA3("out"), "got IA3, expected a method with a factored delta"),
        (jl.TokenMask(jl.LoRA(2)), "got TokenMask, whose delta depends on the activation"),
    ],
    ids=["dora", "ia3", "mask"],
)
def test_methods_without_a_factored_delta(method, text):
    params, x = {"w": jnp.ones((4, 4))}, jnp.ones((1, 4))
    a = jl.init(jax.random.key(0), lambda p, x: x @ p["w"], params, x, methods={"w": method})
    with pytest.raises(ValueError, match=text):
        gather([a])


def test_bad_options(adapters, world):
    with pytest.raises(ValueError, match="missing: got 'skip'"):
        gather(adapters, missing="skip")
    with pytest.raises(ValueError, match="loop: got 'scan'"):
        per_site(concat, loop="scan")
    with pytest.raises(ValueError, match="got no key"):
        per_site(concat, randomised=True)(world.bank, world.weights)
    _, _, sites = gather(adapters)
    with pytest.raises(ValueError, match="loha: got no delta"):
        to_adapter({"lora": world.bank["lora"]}, sites)
    swapped = {p: LowRank(d.v.mT, d.u.mT) for p, d in world.bank.items()}
    with pytest.raises(ValueError, match=r"got a delta of \(12, 8\), expected \(8, 12\)"):
        to_adapter(swapped, sites)
