"""Writing after one prompt is writing after the same prompt in every row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models import decoder
from jlora.transfer.written import write

CONFIG = decoder.DecoderConfig(
    "llama", vocab=12, layers=1, width=8, heads=2, kv_heads=1, head_width=4, ffn=8,
    max_positions=16, tied=True, init_std=0.5,
)  # fmt: skip
FORWARD = functools.partial(decoder.forward, config=CONFIG)
PROMPT = jnp.asarray([3, 1, 4, 0, 0], jnp.int32)  # two of padding
SAME = {"config": CONFIG, "steps": 4, "sampler": decoder.Sampler(temperature=1.0), "end": (2,)}


@pytest.fixture(scope="module")
def params():
    return decoder.init(jax.random.key(0), CONFIG)


def test_it_is_generate_of_a_repeated_prompt(params):
    run = jax.jit(functools.partial(write, FORWARD, count=6, **SAME))
    got = run(params, PROMPT, jnp.int32(3), jax.random.key(1))
    plain = jax.jit(functools.partial(decoder.generate, FORWARD, **SAME))
    want = plain(params, jnp.tile(PROMPT, (6, 1)), jnp.full(6, 3, jnp.int32), jax.random.key(1))
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    texts = {tuple(row) for row in np.asarray(got.ids)[:, 3:].tolist()}
    assert len(texts) > 3  # rows differ
    other = run(params, PROMPT.at[1].set(7), jnp.int32(3), jax.random.key(1))
    assert (np.asarray(other.ids)[:, 3:] != np.asarray(got.ids)[:, 3:]).any()  # the prompt is read


def test_the_prompt_goes_through_the_decoder_once(params):
    shapes = []

    def spied(params, ids, *rest):
        shapes.append(ids.shape)
        return FORWARD(params, ids, *rest)

    given = params, PROMPT, jnp.int32(3), jax.random.key(1)
    jax.eval_shape(functools.partial(write, spied, count=6, **SAME), *given)
    assert shapes[0] == (1, 5) and set(shapes[1:]) == {(6, 1)}


def test_what_cannot_be_is_an_error(params):
    with pytest.raises(ValueError, match="count: got 0"):
        write(FORWARD, params, PROMPT, jnp.int32(3), jax.random.key(0), count=0, **SAME)
    with pytest.raises(ValueError, match=r"prompt: got int32\(1, 5\), expected int32\[t\]"):
        write(FORWARD, params, PROMPT[None], jnp.int32(3), jax.random.key(0), count=1, **SAME)
