"""LongLoRA's groups by a loop over tokens and heads; causality, flow between groups, cost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models import decoder
from jlora.models.decoder import ShiftedAttention, attend, interpolated, visible

B, L, G, HEADS, WIDTH, SCALE = 2, 16, 4, 4, 3, 0.7
POSITIONS = jnp.broadcast_to(jnp.arange(L)[None], (B, L))
SEEN = visible(POSITIONS, POSITIONS)
CONFIG = decoder.DecoderConfig(
    "llama", vocab=30, layers=2, width=16, heads=4, kv_heads=2, head_width=4, ffn=16,
    max_positions=L, tied=True, init_std=0.3,
)  # fmt: skip


def heads(kv):
    draw = np.random.default_rng(0)
    shapes = [(B, L, n, WIDTH) for n in (HEADS, kv, kv)]
    return [jnp.asarray(draw.normal(size=s), jnp.float32) for s in shapes]


@functools.partial(jax.jit, static_argnums=0)
def run(pattern, q, k, v, seen):
    return pattern(q, k, v, seen, scale=SCALE, cap=0.0)


def oracle(q, k, v, seen, group, move):
    """Every token and head by itself, from the equation of the docstring."""
    q, k, v, seen = (np.asarray(x, np.float64) for x in (q, k, v, seen))
    out = np.zeros(q.shape)
    for b, t, j in np.ndindex(B, L, HEADS):
        shift = move if j >= HEADS // 2 else 0
        own = j * k.shape[2] // HEADS
        near = [s for s in range(L) if (s + shift) // group == (t + shift) // group]
        near = [s for s in near if seen[b, t, s]]
        weight = np.exp([SCALE * q[b, t, j] @ k[b, s, own] for s in near])
        out[b, t, j] = weight @ v[b, near, own] / weight.sum()
    return out


@pytest.mark.parametrize("kv", [2, 1])
def test_value_by_a_loop_over_tokens_and_heads(kv):
    parts = heads(kv)
    got = run(ShiftedAttention(G), *parts, SEEN)
    np.testing.assert_allclose(got, oracle(*parts, SEEN, G, G // 2), atol=1e-5)
    assert np.abs(got - oracle(*parts, SEEN, G, 0)).max() > 0.01, "mutation: groups not moved"
    whole = oracle(*parts, SEEN, L, 0)
    assert np.abs(got - whole).max() > 0.01, "mutation: full attention"


def test_packed_rows_keep_their_documents_apart():
    segments = jnp.asarray([[0] * 6 + [1] * 10] * B)
    seen = visible(POSITIONS, POSITIONS, segments, segments)
    parts = heads(2)
    got = run(ShiftedAttention(G), *parts, seen)
    np.testing.assert_allclose(got, oracle(*parts, seen, G, G // 2), atol=1e-5)


def test_one_group_is_full_attention_of_the_heads_that_stay():
    parts = heads(2)
    got = run(ShiftedAttention(L), *parts, SEEN)
    full = run(attend, *parts, SEEN)
    np.testing.assert_allclose(got[:, :, :2], full[:, :, :2], atol=1e-6)
    halves = [x[:, : L // 2] for x in parts]
    np.testing.assert_allclose(
        got[:, : L // 2, 2:], run(attend, *halves, SEEN[:, : L // 2, : L // 2])[:, :, 2:], atol=1e-6
    )
    still = run(ShiftedAttention(L, shift=False), *parts, SEEN)
    np.testing.assert_allclose(still, full, atol=1e-6)


def reach(pattern):
    """bool [tokens, tokens]: whether an output depends on a value."""
    q, k, v = heads(2)
    derivative = jax.jacobian(lambda v: run(pattern, q[:1], k[:1], v, SEEN[:1]).sum((0, 2, 3)))
    return np.abs(derivative(v[:1])).sum((1, 3, 4)) > 1e-9


def test_no_token_sees_a_later_one_and_groups_reach_their_neighbours():
    later = np.triu(np.ones((L, L), bool), 1)
    found = reach(ShiftedAttention(G))
    assert not (found & later).any()
    assert found[G, G - 1], "the first token of a group sees the group before"
    alone = reach(ShiftedAttention(G, shift=False))
    assert not alone[G, G - 1] and not (alone & later).any()
    wrapped = reach(ShiftedAttention(G, wrap=True))
    assert wrapped[0, L - 1], "mutation: the rolled groups leak the end into the start"


def test_arithmetic_is_linear_in_the_length_at_a_fixed_group():
    def flops(pattern, length):
        shapes = [jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)] * 3
        seen = jax.ShapeDtypeStruct((1, length, length), jnp.bool_)
        return run.lower(pattern, *shapes, seen).compile().cost_analysis()["flops"]

    # the moved half has one group more
    assert flops(ShiftedAttention(32), 512) < 2.1 * flops(ShiftedAttention(32), 256)
    assert flops(attend, 512) > 3.9 * flops(attend, 256)


def test_training_with_groups_serves_the_same_parameters_with_full_attention():
    params = decoder.init(jax.random.key(0), CONFIG)
    ids = jax.random.randint(jax.random.key(1), (1, L), 0, CONFIG.vocab)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_grad(pattern, params):
        def loss(params):
            logits = decoder.forward(params, ids, config=CONFIG, attend=pattern).logits
            return decoder.loss(logits, ids, jnp.ones(ids.shape))

        return jax.value_and_grad(loss)(params)

    grouped, grads = value_and_grad(ShiftedAttention(G), params)
    full, _ = value_and_grad(attend, params)
    assert np.isfinite(grouped) and grouped != full
    assert all(np.isfinite(g).all() and np.any(g != 0) for g in jax.tree.leaves(grads))


def test_interpolated_positions_are_those_of_the_old_context():
    long = interpolated(CONFIG, 4.0)
    assert (
        long.max_positions == 4 * L
        and dataclasses.replace(long, rope=CONFIG.rope, max_positions=L) == CONFIG
    )
    angles = decoder.rope.angles
    new = angles(long.rope, 4, 4 * POSITIONS)
    for got, want in zip(new, angles(CONFIG.rope, 4, POSITIONS), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: ShiftedAttention(3), "group: got 3"),
        (lambda: ShiftedAttention(4, shift=False, wrap=True), "wrap: got True"),
        (lambda: run(ShiftedAttention(6), *heads(2), SEEN), "row: got 16 tokens"),
        (lambda: run(ShiftedAttention(4), *[x[:, :, :1] for x in heads(1)], SEEN), "heads: got 1"),
        (lambda: run(ShiftedAttention(4), heads(2)[0][:, :8], *heads(2)[1:], SEEN), "keys: got 16"),
        (lambda: interpolated(CONFIG, 0.5), "factor: got 0.5"),
        (lambda: interpolated(interpolated(CONFIG, 2), 2), "scaling: got 'linear'"),
    ],
)
def test_what_cannot_work_is_an_error(wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong()
