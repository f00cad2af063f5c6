"""The contract: layouts, initialisation a slice at a time, banks, shared tensors."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.core.init import initialise
from jlora.core.site import fold, unfold
from jlora.io.names import NameMap


def leaf(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def site(path="w", shape=(3, 4, 5), kinds="sio", dtype=jnp.float32, **more):
    return jl.Site(path, shape, kinds, jnp.dtype(dtype), **more)


def test_fold_is_the_matrix_by_numpy():
    w = leaf(2, 3, 4, 5)
    expected = np.asarray(w).transpose(2, 1, 0, 3).reshape(4, 3, 10)
    np.testing.assert_array_equal(fold(w, "oiso"), expected)


@pytest.mark.parametrize("kinds", ["sioo", "oiso", "iois", "ssio", "oooo", "isos"])
def test_unfold_undoes_fold(kinds):
    w = leaf(2, 3, 4, 5)
    np.testing.assert_array_equal(unfold(fold(w, kinds), kinds, w.shape), w)


def test_site_sizes():
    s = site(shape=(3, 4, 2, 5), kinds="soio", dtype=jnp.bfloat16)
    assert (s.d_in, s.d_out, s.stack) == (2, 20, (3,))
    assert s.param_dtype == jnp.float32
    assert s.slice().shape == (4, 2, 5) and s.slice().kinds == "oio"


@dataclasses.dataclass(frozen=True)
class Recorder(jl.Method):
    """Keeps what `init` can see."""

    def shared(self, key, sites):
        return {"t": jnp.ones(len(sites))}, {"f": jnp.zeros(2)}

    def init(self, key, site, context):
        seen = {
            "w": context.weight(),
            "row": jnp.asarray(context.index),
            "common": context.shared["t"],
        }
        return {"key": jax.random.normal(key, ())}, seen

    def merge(self, w, p):
        return w + p["t"].sum() + p["key"]


def test_init_sees_the_weight_of_its_slice():
    w = leaf(3, 5, 4)
    sites = [
        (site("v", (4,), "o", group="*0"), Recorder()),
        (site("w", w.shape, "soi", group="*0"), Recorder()),
    ]
    made = initialise(jax.random.key(0), sites, {"w": w, "v": leaf(4)})
    np.testing.assert_array_equal(made.frozen["w"]["w"], np.asarray(w).swapaxes(1, 2))
    np.testing.assert_array_equal(made.frozen["w"]["row"], np.arange(3))
    np.testing.assert_array_equal(made.frozen["w"]["common"], np.ones((3, 2)))
    assert len(np.unique(np.asarray(made.trainable["w"]["key"]))) == 3
    assert made.trainable["*0"]["t"].shape == (2,) and made.frozen["*0"]["f"].shape == (2,)
    assert made.sites[1][0].group == "*0"


def test_init_does_not_depend_on_the_other_sites():
    def fn(p, x):
        return x @ p["a"] @ p["b"]

    params, x = {"a": leaf(3, 4), "b": leaf(4, 2)}, leaf(2, 3)
    both = jl.init(jax.random.key(1), fn, params, x, methods={"a|b": jl.LoRA(2)})
    one = jl.init(jax.random.key(1), fn, params, x, methods={"b": jl.LoRA(2)})
    np.testing.assert_array_equal(both.trainable["b"]["a"], one.trainable["b"]["a"])


def test_init_of_abstract_parameters():
    def fn(p, x):
        return x @ p["w"]

    shapes = {"w": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)}
    x = jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
    made = jl.init(jax.random.key(0), fn, shapes, x, methods={"w": jl.LoRA(2)})
    assert made.trainable["w"]["a"].dtype == jnp.float32
    with pytest.raises(ValueError, match="w: this method reads the weight"):
        jl.init(jax.random.key(0), fn, shapes, x, methods={"w": Recorder()})


@functools.cache
def adapters(ranks=(2, 2), alphas=(4.0, 8.0)):
    def one(k, rank, alpha):
        made = initialise(jax.random.key(k), [(site(), jl.LoRA(rank, alpha))], {"w": leaf(3, 4, 5)})
        return made.replace(trainable=jax.tree.map(lambda t: t + 1.0, made.trainable))

    return [one(k, r, a) for k, (r, a) in enumerate(zip(ranks, alphas, strict=True))]


def test_a_bank_holds_adapters_of_other_alpha_and_rank():
    a, b = adapters(ranks=(2, 3))
    bank = jl.stack([a, b])
    assert bank.trainable["w"]["a"].shape == (2, 3, 4, 3)
    assert bank.sites[0][1].rank == 3
    w = {"w": leaf(3, 4, 5)}
    for k, one in enumerate((a, b)):
        merged = jax.jit(lambda i: jl.merge(w, bank[i]))(k)
        np.testing.assert_allclose(merged["w"], jl.merge(w, one)["w"], rtol=1e-6, atol=1e-6)


def test_a_bank_is_a_sequence():
    a, b = adapters()
    bank = jl.stack([a, b, a])
    assert len(bank) == len(list(bank)) == 3 and bool(bank)
    for got, one in zip(bank, (a, b, a), strict=True):
        chex.assert_trees_all_equal(got.trainable, one.trainable)
    np.testing.assert_array_equal(bank[-2].trainable["w"]["a"], b.trainable["w"]["a"])
    assert len(bank[1:]) == 2 and len(bank[np.array([0, 2])]) == 2
    for i in (3, -4, np.int64(7)):
        with pytest.raises(IndexError, match=rf"adapter {i}: the bank has 3"):
            bank[i]
    np.testing.assert_array_equal(
        jax.jit(lambda i: bank[i].trainable["w"]["b"])(1), b.trainable["w"]["b"]
    )


@pytest.mark.parametrize("method", [jl.LoRA(2), jl.IA3(), jl.VeRA(2), jl.OFT(2), jl.Experts()])
def test_one_adapter_is_told_from_a_bank(method):
    """By its scale, or for methods without one by what their init makes."""
    one = initialise(jax.random.key(0), [(site(group="*0"), method)], {"w": leaf(3, 4, 5)})
    bank = jl.stack([one] * 2)
    assert (one.bank_shape, bank.bank_shape) == ((), (2,))
    assert jl.stack([bank] * 3).bank_shape == (3, 2)
    assert jax.vmap(lambda a: jnp.zeros(len(a.bank_shape)))(bank).shape == (2, 0)
    for use in (lambda: one[0], lambda: len(one), lambda: list(one), lambda: one[-1]):
        with pytest.raises(TypeError, match="got one adapter of 1 sites, expected a bank"):
            use()


def test_where_one_adapter_is_wanted_a_bank_is_refused(tmp_path):
    bank = jl.stack(adapters())
    names = NameMap({"w": "w.{i}"})
    uses = {
        "save_peft": lambda: jl.io.save_peft(tmp_path / "peft", bank, names),
        "save_kohya": lambda: jl.io.save_kohya(tmp_path / "k.safetensors", bank, names),
        "save_diffusers": lambda: jl.io.save_diffusers(tmp_path / "d.safetensors", bank, names),
        "to_lora": lambda: jl.merging.to_lora(bank),
    }
    for name, use in uses.items():
        with pytest.raises(ValueError, match=rf"{name}: got a bank of 2 adapters, expected one"):
            use()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="stack: got no adapters"):
        jl.stack([])


def test_the_text_and_the_size_of_an_adapter():
    a, b = adapters()
    assert a.size == 3 * (4 * 2 + 2 * 5) and jl.stack([a, b]).size == 2 * a.size
    assert repr(a).startswith("Adapter(1 sites, 54 trainable parameters)\n  LoRA(rank=2")
    assert repr(a).endswith(": w") and len(repr(a)) < 200
    assert repr(jl.stack([a, b])).startswith("Adapter(bank of 2, 1 sites, 108 trainable")


def test_ranks_are_positive_integers():
    ranked: list = [
        m for m in vars(jl).values() if isinstance(m, type) and issubclass(m, jl.Method)
    ]
    ranked = [m for m in ranked if "rank" in getattr(m, "__dataclass_fields__", {})]
    assert len(ranked) >= 10
    for method in ranked:
        for rank in (4.5, 0, -1, True, "4"):
            text = rf"^{method.__name__}\.rank: got {rank!r}, expected an integer of at least 1$"
            with pytest.raises(ValueError, match=text):
                method(rank=rank)
        assert method(rank=np.int64(2)).rank == 2


def test_padding_stays_zero_under_gradient_descent():
    a, b = adapters(ranks=(2, 3))
    bank = jl.stack([a, b])
    w = {"w": leaf(3, 4, 5)}

    def loss(trainable):
        return jnp.sum(jl.merge(w, bank.replace(trainable=trainable)[0])["w"] ** 2)

    g = jax.grad(loss)(bank.trainable)["w"]
    assert float(jnp.abs(g["a"][0, ..., 2:]).max()) == 0
    assert float(jnp.abs(g["b"][0, :, 2:]).max()) == 0


def test_a_bank_of_strangers_is_refused():
    a, b = adapters()
    other = a.replace(sites=((dataclasses.replace(a.sites[0][0], path="v"), a.sites[0][1]),))
    with pytest.raises(ValueError, match=r"adapter 1: got v LoRA.*expected w LoRA"):
        jl.stack([a, other])
    with pytest.raises(ValueError, match="adapter 1: got 0, expected 1 sites"):
        jl.stack([a, b.replace(sites=())])
    frozen = a.replace(sites=((a.sites[0][0], jl.LoRA(2, freeze_a=True)),))
    with pytest.raises(ValueError, match="w: methods differ in more than rank"):
        jl.stack([a, frozen])


def test_merge_of_a_method_without_one_says_why():
    class Router(jl.Method):
        pass

    with pytest.raises(NotImplementedError, match="Router has no merge: its delta depends on x"):
        Router().merge(jnp.zeros((2, 2)), {})
    assert not Router().merges and jl.LoRA().merges and Recorder().merges


def test_ranks_inside_two_wrappers_are_found():
    def fn(p, x):
        return x @ p["a"]

    params, x, mask = {"a": leaf(3, 4)}, leaf(2, 3), jnp.ones(2, bool)
    methods = [jl.TokenMask(jl.Decomposed(jl.LoRA(rank))) for rank in (2, 3)]
    made = [jl.init(jax.random.key(1), fn, params, x, methods={"a": m}) for m in methods]
    bank = jl.stack(made)
    assert bank.trainable["a"]["a"].shape == (2, 3, 3)
    tuned = jax.vmap(lambda a: jl.lift(fn)(params, a, x, ctx={"tokens": mask}))(bank)
    np.testing.assert_allclose(tuned, jnp.stack([fn(params, x)] * 2), rtol=1e-6)
