"""Eight devices: the logits and answers of one, adapters that send thin tensors, nothing twice."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jlora.models import decoder
from jlora.serving import components, engine, forward, mix, pages, parallel, schedule
from jlora.serving.paged_pool import in_pages, in_use, pages_of_component
from jlora.serving.state import Engine, Work, start

CONFIG = decoder.DecoderConfig(
    "llama", vocab=40, layers=2, width=24, heads=16, kv_heads=8, head_width=4, ffn=32,
    max_positions=64, tied=True, init_std=0.3,
)  # fmt: skip
TARGETS = "layers/(attention/(query|value|out)|ffn/down)/kernel"
RANKS = {"small": 2, "large": 11}
WIDTH, COUNT = forward.width(CONFIG), 120
NAMES = ("large", "small")


@pytest.fixture(scope="module")
def world():
    """(parameters, sites, components by name, layout of eight devices)."""
    params = decoder.init(jax.random.key(0), CONFIG)
    sites = forward.adaptable(CONFIG, params, TARGETS)
    draw, size = np.random.default_rng(0), components.size(sites)
    flat = {n: (0.2 * draw.normal(size=(r, size))).astype("f4") for n, r in RANKS.items()}
    return params, sites, flat, parallel.over(8)


def inputs(world, layout, each=False, dtype=None):
    """A pool with both adapters, the weights, their bank, and a batch of three prompts."""
    params, sites, flat, _ = world
    table, data = pages.empty_table(COUNT), np.zeros((COUNT, WIDTH), np.float32)
    for name in NAMES:
        content = in_pages(flat[name], WIDTH)
        table, own = pages.put(table, name, len(content))
        data[own] = content
    ids, write = np.zeros((3, 4), np.int32), np.full((3, 4), COUNT)
    for k in range(3):
        table, own = pages.allocate(table, 4)
        ids[k], write[k] = np.arange(4) + 7 * k, own
    arrays = ([0, components.BASE, 1], ids, [0] * 3, [3] * 3, np.zeros((3, 4)), write)
    data = jnp.asarray(data)
    if layout is not None:
        data, params = layout.pages(data), parallel.place(layout, CONFIG, params)
    where, owner = map(jnp.asarray, in_use(table, NAMES, pages_of_component(sites, WIDTH), each))
    bank = engine._gather(data, where, owner, sites, layout, each, dtype)
    return data, params, bank, forward.Batch(*map(engine._ints, arrays))


@pytest.fixture(scope="module")
def whole(world):
    """Logits and pool of one device."""
    out = forward.step(CONFIG, *inputs(world, None))
    return np.asarray(out.logits), np.asarray(out.data)


def test_logits_and_pages_are_those_of_one_device(world, whole):
    layout = world[3]
    data, params, bank, batch = inputs(world, layout)
    path = "layers/attention/{}/kernel"
    query, out = (bank.frozen[path.format(n)] for n in ("query", "out"))
    shapes = [t.addressable_shards[0].data.shape for t in (query["u"], query["v"])]
    assert shapes == [(2, 2, 24), (2, 16, 8)]  # of T = 16 components and 64 columns
    shapes = [t.addressable_shards[0].data.shape for t in (out["u"], out["v"])]
    assert shapes == [(2, 16, 8), (2, 2, 24)]
    assert data.addressable_shards[0].data.shape == (COUNT, WIDTH // 8)
    got = forward.step(CONFIG, data, params, bank, batch, layout)
    assert got.data.sharding == data.sharding
    np.testing.assert_allclose(got.logits, whole[0], atol=2e-5)
    np.testing.assert_allclose(got.data, whole[1], atol=2e-5)


@pytest.mark.parametrize(("devices", "dtype"), [(1, "float16"), (8, "bfloat16")])
def test_components_in_half_precision_are_the_rounded_ones(world, whole, devices, dtype):
    layout = world[3] if devices > 1 else None
    data, params, bank, batch = inputs(world, layout, True, dtype)
    assert {t.dtype.name for p, a in bank.frozen.items() if p != "components"
            for t in a.values() if t.ndim > 1} == {dtype}  # fmt: skip
    got = forward.step(CONFIG, data, params, bank, batch, layout)
    assert got.logits.dtype == jnp.float32
    rounded = {n: np.asarray(jnp.asarray(t).astype(dtype), np.float32) for n, t in world[2].items()}
    want = forward.step(CONFIG, *inputs((*world[:2], rounded, None), None))
    np.testing.assert_allclose(got.logits, want.logits, atol=2e-5)
    off = float(np.abs(np.asarray(got.logits) - whole[0]).max())
    assert 4e-5 < off < {"float16": 5e-3, "bfloat16": 4e-2}[dtype], "the rounding is seen, no more"


def sent(program):
    """Numbers that each collective of a program gives, by its kind."""
    found = {}
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for shape, kind in re.findall(rf"= \w+\[([\d,]*)\]\S* ({kinds})\(", program.as_text()):
        found.setdefault(kind, []).append(int(np.prod([int(n) for n in shape.split(",") if n])))
    return {kind: sorted(sizes) for kind, sizes in found.items()}


@pytest.mark.parametrize("own", [False, True])
def test_adapters_send_thin_tensors_and_leave_what_the_base_sends(world, own):
    layout = world[3]
    data, params, bank, batch = inputs(world, layout, own)
    lower = forward.step.lower
    base = sent(lower(CONFIG, data, params, None, batch, layout).compile())
    with_adapters = sent(lower(CONFIG, data, params, bank, batch, layout).compile())
    tokens, components_ = batch.ids.size, 16
    tokens //= len(batch.ids) if own else 1  # a component meets the tokens of its row only
    more = {}
    for kind, sizes in with_adapters.items():
        rest = list(sizes)
        for size in base.get(kind, []):
            assert size in rest, f"{kind} of the base is gone: {base} {with_adapters}"
            rest.remove(size)
        more[kind] = rest
    assert more.pop("all-gather") == [tokens * components_] * 2  # query, value
    assert more.pop("reduce-scatter") == [tokens * components_ // 8] * 2  # out, down
    assert not any(more.values()), more


def answers(world, layout):
    params, sites, flat, _ = world
    limits = schedule.Limits(rows=2, adapters=2, queue=9, patience=1e6)
    if layout is not None:
        params = parallel.place(layout, CONFIG, params)
    at = Engine(CONFIG, params, sites, flat.__getitem__, COUNT, limits, layout)
    ticks = itertools.count()
    state, tokens = start(at, 0.0), {}
    for k, name in enumerate((*NAMES, None)):
        state, number = engine.submit(at, state, Work((1 + k, 5, 9), 3, name), 0.0)
        tokens[number] = []
    while state.queue.waiting or state.rows:
        state, events = engine.step(at, state, lambda: float(next(ticks)))
        for event in events:
            tokens[event.id].append(event.token)
    return tokens


def test_the_engine_answers_as_on_one_device(world, monkeypatch):
    want = answers(world, None)
    monkeypatch.setattr(mix, "GAIN", 0.0)  # rows with components of their own
    assert answers(world, world[3]) == want


def test_mutation_a_device_that_keeps_its_thin_tensor_to_itself(world, whole, monkeypatch):
    def alone(inward, outward, x, w, u, v, owner, row, *, axis):
        at, own = jax.lax.axis_index(axis) * len(u), parallel._part(owner, len(u), axis)
        v = jax.lax.dynamic_slice_in_dim(v, at, len(u))
        return x @ w + outward(inward(x, u, own, row), v, own, row)

    monkeypatch.setattr(parallel, "_column", alone)
    layout = dataclasses.replace(world[3], mesh=jax.make_mesh(
        (1, 8), ("copies", "tensor"), axis_types=(AxisType.Auto,) * 2
    ))  # fmt: skip # another mesh: programs of the first one are kept
    got = forward.step(CONFIG, *inputs(world, layout), layout)
    assert np.abs(np.asarray(got.logits) - whole[0])[[0, 2]].max() > 1e-2
    np.testing.assert_allclose(got.logits[1], whole[0][1], atol=2e-5)  # the base has no factors


def test_refusals(world):
    layout = world[3]
    with pytest.raises(ValueError, match="axis: got 'rows', expected one of"):
        parallel.Layout(layout.mesh, "rows")
    few = dataclasses.replace(CONFIG, kv_heads=4)
    with pytest.raises(ValueError, match="kv_heads: got 4, expected a multiple of 8"):
        parallel.place(layout, few, world[0])
    odd = {"layers": {"ffn": {"up": {"kernel": jnp.ones((2, 24, 30))}}}}
    with pytest.raises(ValueError, match=r"layers/ffn/up/kernel: got \(2, 24, 30\)"):
        parallel.place(layout, CONFIG, odd)
    with pytest.raises(ValueError, match="got 3 devices, expected a divisor of 16"):
        parallel.over(3)
    with pytest.raises(ValueError, match="devices: got 9, expected at most 8"):
        parallel.over(9)
