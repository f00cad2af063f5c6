"""Rows at different depths of one block: each as if it were alone, and no row waits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.models import decoder
from jlora.models.decoder import depth_batching as lib
from jlora.models.decoder import loops
from jlora.pruning import early_exit
from jlora.pruning.recursive import by_depth, looped, relaxed, tied

CONFIG = decoder.DecoderConfig(
    "llama", vocab=20, layers=6, width=8, heads=2, kv_heads=1, head_width=4, ffn=12,
    max_positions=16, init_std=0.5,
)  # fmt: skip
SLOTS, LOOPS, TAU = 12, 3, 0.25
DRAW = np.random.default_rng(0)
REQUESTS = [
    lib.Request(DRAW.integers(0, 20, n).astype(np.int32), most)
    for n, most in ((3, 6), (5, 1), (1, 7), (4, 4), (2, 5))
]
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def model():
    """Shared parameters whose norms differ by layer, and an adapter of all six layers."""
    params = decoder.init(jax.random.key(0), CONFIG)
    draw = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + jnp.float32(0.1 * draw.normal(size=x.shape)), params)
    shared = tied(params, 2)
    run, whole = functools.partial(decoder.forward, config=CONFIG), looped(shared, 6)
    fresh = jl.init(
        jax.random.key(1), run, whole, jnp.zeros((1, 2), jnp.int32),
        methods={r"layers/(attention/query|ffn/down)/kernel": jl.LoRA(2, alpha=3.0)},
    )  # fmt: skip
    return shared, relaxed(fresh, params, shared)


@pytest.fixture(scope="module")
def run(model):
    shared, adapter = model
    return functools.partial(
        lib.generate_depth_wise, shared, by_depth(adapter, 2), key=KEY, config=CONFIG, slots=SLOTS
    )


@pytest.fixture(scope="module")
def mixed(run):
    return run(REQUESTS, rows=2, threshold=TAU)


def test_every_row_is_what_it_is_alone(run, mixed):
    assert {e for a in mixed.answers for e in a.exits[1:]} == {0, 1, 2}
    for request, answer in zip(REQUESTS, mixed.answers, strict=True):
        (alone,) = run([request, request], rows=2, threshold=TAU).answers[:1]
        np.testing.assert_array_equal(answer.ids, alone.ids)
        np.testing.assert_array_equal(answer.exits, alone.exits)
        assert len(answer.ids) == request.most
    other = run(REQUESTS, rows=2, threshold=TAU + 0.3)
    assert any(
        (a.exits != b.exits).any() for a, b in zip(other.answers, mixed.answers, strict=True)
    )


def test_logits_of_mixed_depths_are_those_of_rows_alone(model):
    shared, adapter = model
    bank, draw = by_depth(adapter, 2), np.random.default_rng(2)
    f32 = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)  # noqa: E731
    state = lib.empty_rows(3, SLOTS, shared, CONFIG)
    cache = decoder.Cache(*(f32(*t.shape) for t in state.cache))
    depth, position = jnp.asarray([2, 0, 1], jnp.int32), jnp.asarray([4, 1, 7], jnp.int32)
    hidden = f32(3, CONFIG.width)

    @jax.jit
    def hiddens(depth, hidden, position, cache):
        one = lambda d, h, p, c: loops.run_block(  # noqa: E731
            shared, bank, d, h[None, None], p[None, None], config=CONFIG,
            cache=jax.tree.map(lambda t: t[d][:, None], c),
        ).hidden[0, 0]  # fmt: skip
        return jax.vmap(one)(depth, hidden, position, cache)

    got = hiddens(depth, hidden, position, cache)
    for i in range(3):
        same = jax.tree.map(lambda t: jnp.stack([t[i]] * 3), (depth, hidden, position, cache))  # noqa: B023
        np.testing.assert_allclose(hiddens(*same)[0], got[i], atol=1e-5)
    other = hiddens(jnp.asarray([0, 0, 1], jnp.int32), hidden, position, cache)
    assert np.abs(other[0] - got[0]).max() > 1e-2, "mutation: the factors of another depth"
    assert np.abs(other[1] - got[1]).max() < 1e-5


def test_without_exits_it_is_generate(model, run):
    shared, adapter = model
    whole = jl.merge(looped(shared, 6), adapter)
    found = run(REQUESTS[2:4], rows=2)
    assert all((a.exits == LOOPS - 1).all() for a in found.answers)
    prompts = np.zeros((2, 4), np.int32)
    for row, request in zip(prompts, REQUESTS[2:4], strict=True):
        row[: len(request.ids)] = request.ids
    lengths = np.asarray([len(r.ids) for r in REQUESTS[2:4]], np.int32)
    generate = jax.jit(
        functools.partial(
            decoder.generate, functools.partial(decoder.forward, config=CONFIG),
            config=CONFIG, steps=7,
        )
    )  # fmt: skip
    want = np.asarray(generate(whole, jnp.asarray(prompts), jnp.asarray(lengths), KEY).ids)
    for i, (request, answer) in enumerate(zip(REQUESTS[2:4], found.answers, strict=True)):
        start = len(request.ids)
        np.testing.assert_array_equal(answer.ids, want[i, start : start + request.most])


def test_steps_are_those_of_the_count_and_fewer_than_of_rows_that_wait(mixed):
    exits = [a.exits[1:].tolist() for a in mixed.answers if len(a.exits) > 1]
    runs = early_exit.block_runs(exits, rows=2, loops=LOOPS)
    assert mixed.steps == runs.depth_wise < runs.waiting < runs.full


def test_an_end_token_ends_a_row(run, mixed):
    stop = int(mixed.answers[0].ids[2])
    found = run(REQUESTS, rows=2, threshold=TAU, end=(stop,))
    for cut, answer in zip(found.answers, mixed.answers, strict=True):
        where = np.flatnonzero(answer.ids == stop)
        np.testing.assert_array_equal(
            cut.ids, answer.ids[: where[0] + 1] if where.size else answer.ids
        )
    assert found.steps < mixed.steps


def test_draws_belong_to_the_request_and_not_to_the_row(run):
    hot = decoder.Sampler(temperature=2.0)
    found = run(REQUESTS, rows=2, threshold=TAU, sampler=hot).answers
    later = run(REQUESTS[:3], rows=2, threshold=TAU, sampler=hot).answers
    for a, b in zip(later, found, strict=False):
        np.testing.assert_array_equal(a.ids, b.ids)
    twins = run([REQUESTS[0], REQUESTS[0]], rows=2, threshold=TAU, sampler=hot).answers
    assert (twins[0].ids != twins[1].ids).any()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rows": 0}, "rows: got 0"),
        ({"threshold": 1.5}, "threshold: got 1.5"),
        ({"requests": [lib.Request(np.zeros(0, np.int32), 2)]}, "request 0: got 0 tokens"),
        ({"requests": [lib.Request(np.zeros(9, np.int32), 4)]}, "at most 12 together"),
    ],
)
def test_what_cannot_work_is_an_error(run, changed, said):
    with pytest.raises(ValueError, match=said):
        run(**{"requests": REQUESTS, "rows": 2, **changed})


def test_a_bank_of_another_size_is_an_error(model):
    shared, adapter = model
    with pytest.raises(ValueError, match=r"bank: got shape \(2,\), expected \(3,\)"):
        loops.exits(shared, by_depth(adapter, 2)[:2], jnp.zeros((1, 2), jnp.int32), config=CONFIG)
