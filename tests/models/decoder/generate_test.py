"""The cache, rows of different length, packed rows and the four ways to draw a token."""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.models import decoder
from jlora.models.decoder import attention

CONFIG = decoder.DecoderConfig(
    "gemma3_text", vocab=40, layers=2, width=16, heads=4, kv_heads=2, head_width=6, ffn=24,
    max_positions=64, local_rope=decoder.Rope(50.0), local=(True, False), window=4, qk_norm=True,
    unit_norms=True, post_norms=True, init_std=0.3, tied=True,
)  # fmt: skip
PARAMS = decoder.init(jax.random.key(0), CONFIG)
FORWARD = functools.partial(decoder.forward, config=CONFIG)
JITTED = jax.jit(FORWARD)
LENGTHS = np.array([5, 2], np.int32)
PROMPTS = np.random.default_rng(1).integers(1, 40, (2, 5)).astype(np.int32)


def run(forward, params, key=0, steps=6, **kwargs):
    return jax.jit(
        functools.partial(decoder.generate, forward, config=CONFIG, steps=steps, **kwargs)
    )(params, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), jax.random.key(key))


def greedy_without_cache(params, row, steps):
    """The oracle: the whole text once more for every token, one row at a time, no padding."""
    for _ in range(steps):
        logits = JITTED(params, jnp.asarray(np.pad(row, (0, 16 - len(row)))[None])).logits
        row = np.append(row, int(jnp.argmax(logits[0, len(row) - 1])))
    return row


def test_greedy_rows_of_different_length_equal_one_row_at_a_time_without_a_cache():
    got = run(FORWARD, PARAMS)
    assert got.lengths.tolist() == [11, 8]
    for i, n in enumerate(LENGTHS):
        want = greedy_without_cache(PARAMS, PROMPTS[i, :n], 6)
        np.testing.assert_array_equal(got.ids[i, : n + 6], want)
    assert got.ids[1, 8:].tolist() == [0, 0, 0]


def test_a_row_ends_at_its_end_token_and_the_others_go_on():
    free = run(FORWARD, PARAMS)
    end = int(free.ids[0, 6])  # row 0's second new token
    got = run(FORWARD, PARAMS, end=(end,), pad=39)
    stop = 5 + free.ids[0, 5:].tolist().index(end) + 1
    assert int(got.lengths[0]) == stop and set(got.ids[0, stop:].tolist()) == {39}
    row = free.ids[1, 2:8].tolist()
    assert int(got.lengths[1]) == 2 + (row.index(end) + 1 if end in row else 6)


def test_a_lifted_decoder_generates_what_the_merged_one_does():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = jl.init(
            jax.random.key(1), FORWARD, PARAMS, jnp.asarray(PROMPTS),
            methods={r"layers/(attention|ffn)/.*kernel": jl.LoRA(rank=2)},
        )  # fmt: skip
    noise = lambda x: x + 0.2 * jax.random.normal(jax.random.key(2), x.shape)  # noqa: E731
    adapter = adapter.replace(trainable=jax.tree.map(noise, adapter.trainable))
    lifted = jl.lift(FORWARD)
    tuned = run(lambda p, *xs: lifted(p, adapter, *xs), PARAMS)
    merged = run(FORWARD, jl.merge(PARAMS, adapter))
    np.testing.assert_array_equal(tuned.ids, merged.ids)
    assert (tuned.ids != run(FORWARD, PARAMS).ids).any()


def test_packed_documents_do_not_see_each_other():
    ids = jnp.asarray(PROMPTS[:1])
    packed = jnp.concatenate([ids[:, :2], ids[:, 2:]], 1)
    positions = jnp.asarray([[0, 1, 0, 1, 2]], jnp.int32)
    segments = jnp.asarray([[7, 7, 3, 3, 3]], jnp.int32)
    got = JITTED(PARAMS, packed, positions, segments).logits
    first, second = JITTED(PARAMS, ids[:, :2]).logits, JITTED(PARAMS, ids[:, 2:]).logits
    np.testing.assert_allclose(got, jnp.concatenate([first, second], 1), atol=2e-5)
    leaky = JITTED(PARAMS, packed, positions).logits  # mutation: no segments
    assert np.abs(np.asarray(leaky - got)).max() > 1e-3


def test_remat_changes_no_gradient():
    def loss(params, remat):
        out = decoder.forward(params, jnp.asarray(PROMPTS), config=CONFIG, remat=remat)
        return decoder.loss(out.logits, jnp.asarray(PROMPTS), jnp.ones(PROMPTS.shape))

    plain, *others = (
        jax.jit(jax.grad(functools.partial(loss, remat=r)))(PARAMS) for r in ("none", "dots", "all")
    )
    for other in others:
        chex.assert_trees_all_close(plain, other, atol=1e-6)


def test_the_loss_by_numpy_ignores_what_has_no_weight():
    rng = np.random.default_rng(3)
    logits, ids = rng.normal(size=(2, 4, 5)), rng.integers(0, 5, (2, 4))
    weights = np.array([[0, 0, 1, 1], [0, 1, 0, 0]], float)
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    terms = [-log[b, t - 1, ids[b, t]] for b in range(2) for t in range(1, 4) if weights[b, t]]
    got = decoder.loss(*(jnp.asarray(x) for x in (logits.astype("f4"), ids, weights.astype("f4"))))
    np.testing.assert_allclose(got, np.mean(terms), rtol=1e-5)


def test_windows_and_caps_by_numpy():
    seen = attention.visible(jnp.arange(5)[None], jnp.arange(5)[None], window=2)[0]
    want = [[q - 2 < k <= q for k in range(5)] for q in range(5)]
    np.testing.assert_array_equal(seen, want)
    x = jnp.asarray([-9.0, 0.0, 3.0])
    np.testing.assert_allclose(attention.soft_cap(x, 2.0), 2 * np.tanh(np.asarray(x) / 2), 1e-6)


def test_samplers_by_numpy():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    draws = 4000
    rows = jnp.asarray(np.tile(logits, (draws, 1)), jnp.float32)
    for sampler, want in (
        (decoder.Sampler(1.0), [0.5, 0.3, 0.15, 0.05]),
        (decoder.Sampler(1.0, top_k=2), [0.625, 0.375, 0, 0]),
        (decoder.Sampler(1.0, top_p=0.79), [0.625, 0.375, 0, 0]),
        (decoder.Sampler(1.0, top_p=0.81), np.array([0.5, 0.3, 0.15, 0]) / 0.95),
        (decoder.Sampler(0.5), np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365),
        (decoder.Sampler(0.0), [1, 0, 0, 0]),
        (decoder.Sampler(1.0, top_p=1e-6), [1, 0, 0, 0]),
    ):
        tokens = np.asarray(decoder.sample(jax.random.key(0), rows, sampler))
        np.testing.assert_allclose(np.bincount(tokens, minlength=4) / draws, want, atol=0.03)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: decoder.Sampler(-1.0), "temperature: got -1.0"),
        (lambda: decoder.Sampler(1.0, top_p=0.0), "top_p: got 0.0"),
        (lambda: decoder.Sampler(1.0, top_k=-1), "top_k: got -1"),
        (lambda: run(FORWARD, PARAMS, steps=0), "steps: got 0"),
        (lambda: FORWARD(PARAMS, jnp.asarray(PROMPTS), jnp.zeros((2, 4), jnp.int32)), "positions"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
