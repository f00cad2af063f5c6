"""AdaLoRA's allocation: step by step what PEFT's allocator does, scores by numpy."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.schedules import adalora, ranks
from jlora.schedules.adalora import Budget

X = jnp.ones((2, 6))
PARAMS = {"v": jnp.zeros((6, 4)), "w": jnp.zeros((6, 4))}
PLAN = Budget(target=3, total=9, warmup=1, final=2, interval=2)
STEPS = 10


@pytest.fixture(scope="module")
def adapter():
    return jl.init(jax.random.key(0), lambda p, x: x @ p["v"] + x @ p["w"], PARAMS, X,
                   methods={"w|v": jl.AdaLoRA(3)})  # fmt: skip


def stream(adapter, seed=0):
    """Arrays and gradients of every step, no two of them alike."""
    rng = np.random.default_rng(seed)
    draw = lambda t: rng.normal(size=t.shape).astype("f4")  # noqa: E731
    return [tuple(jax.tree.map(draw, adapter.trainable) for _ in range(2)) for _ in range(STEPS)]


def by_peft(adapter, plan, steps):
    """(budget, {path: e after the step}) of every step, of PEFT's own class."""
    torch = pytest.importorskip("torch")
    allocator = pytest.importorskip("peft.tuners.adalora.layer").RankAllocator
    model = torch.nn.Module()
    names = {}
    for path, own in adapter.trainable.items():
        for name, kind in (("a", "lora_A"), ("e", "lora_E"), ("b", "lora_B")):
            holder = torch.nn.Module()
            value = own[name].T if name != "e" else own[name][:, None]
            holder.default = torch.nn.Parameter(torch.tensor(np.asarray(value)))
            site = getattr(model, path, None) or torch.nn.Module()
            setattr(model, path, site)
            setattr(site, kind, holder)
            names[path, name] = holder.default
    config = SimpleNamespace(target_r=plan.target / 2, tinit=plan.warmup, tfinal=plan.final,
                             deltaT=plan.interval, total_step=plan.total, beta1=plan.beta1,
                             beta2=plan.beta2)  # fmt: skip
    own = allocator(model, config, "default")
    own.target_bgt = plan.target
    for number, (values, slopes) in enumerate(steps):
        for (path, name), t in names.items():
            form = (lambda x: x[:, None]) if name == "e" else (lambda x: x.T)
            t.data = torch.tensor(form(values[path][name]).copy())
            t.grad = torch.tensor(form(slopes[path][name]).copy())
        budget, _ = own.update_and_allocate(model, number)
        yield budget, {p: names[p, "e"].detach().numpy()[:, 0].copy() for p in values}


def check(adapter, plan):
    state, run = adalora.start(adapter), jax.jit(functools.partial(adalora.step, budget=plan))
    steps, dropped = stream(adapter), 0
    for (values, slopes), (budget, want) in zip(steps, by_peft(adapter, PLAN, steps), strict=True):
        shown = adapter.replace(trainable=jax.tree.map(jnp.asarray, values))
        state, found = run(state, shown, jax.tree.map(jnp.asarray, slopes))
        assert int(plan.at(state.step, 6)) == budget
        for path, e in want.items():
            np.testing.assert_array_equal(found.trainable[path]["e"], e)
            dropped += int((e == 0).sum())
    assert dropped > 8
    return state


def test_every_step_is_that_of_peft(adapter):
    state = check(adapter, PLAN)
    assert int(ranks.kept(state.masks)) == 3


def test_mutation_other_smoothing_is_seen(adapter):
    with pytest.raises(AssertionError):
        check(adapter, Budget(target=3, total=9, warmup=1, final=2, interval=2, beta2=0.2))


def test_scores_by_numpy(adapter):
    state, sens, unc = adalora.start(adapter), 0.0, 0.0
    for values, slopes in stream(adapter)[:3]:
        shown = adapter.replace(trainable=jax.tree.map(jnp.asarray, values))
        state = adalora.observe(state, shown, jax.tree.map(jnp.asarray, slopes), PLAN)
        size = {n: np.abs(np.asarray(values["w"][n], "f8") * slopes["w"][n]) for n in "aeb"}
        if not isinstance(sens, dict):
            sens = unc = dict.fromkeys("aeb", 0.0)
        sens = {n: 0.85 * sens[n] + 0.15 * size[n] for n in "aeb"}
        unc = {n: 0.85 * unc[n] + 0.15 * np.abs(size[n] - sens[n]) for n in "aeb"}
    s = {n: sens[n] * unc[n] for n in "aeb"}
    want = s["e"] + s["a"].mean(0) + s["b"].mean(1)
    np.testing.assert_allclose(adalora.importance(state)["w"], want, rtol=1e-4)


def test_a_site_that_is_never_needed_is_dropped(adapter):
    """Limit: where one site has no gradient, the other gets the whole budget."""
    state, plan = adalora.start(adapter), Budget(target=3, total=3, final=1)
    for values, slopes in stream(adapter)[:4]:
        shown = adapter.replace(trainable=jax.tree.map(jnp.asarray, values))
        none = {"v": jax.tree.map(np.zeros_like, slopes["v"]), "w": slopes["w"]}
        state = adalora.observe(state, shown, jax.tree.map(jnp.asarray, none), plan)
    assert np.asarray(state.masks["w"]).all() and not np.asarray(state.masks["v"]).any()
    small, _ = ranks.shrink(adapter, (), state.masks)
    assert [s.path for s, _ in small.sites] == ["w"]


def test_refusals(adapter):
    for wrong in ({"total": 2}, {"interval": 0}, {"target": 0}, {"beta1": 1.0}):
        with pytest.raises(ValueError, match=r"Budget: got"):
            Budget(**{"target": 3, "total": 9, "warmup": 1, "final": 2} | wrong)
    plain = jl.init(jax.random.key(0), lambda p, x: x @ p["v"], PARAMS, X,
                    methods={"v": jl.LoRA(2)})  # fmt: skip
    with pytest.raises(ValueError, match=r"v: got LoRA\(.*, expected AdaLoRA"):
        adalora.start(plain)
