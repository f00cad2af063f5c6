"""Log-probabilities of answers by numpy: shifted by one, prompt and padding left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.preference import pairs as file
from jlora.preference.pairs import Pairs, scorer, sequence_log_probs

VOCABULARY, WIDTH = 7, 4
RNG = np.random.default_rng(0)
PARAMS = {
    "embed": jnp.asarray(RNG.normal(size=(VOCABULARY, WIDTH)), jnp.float32),
    "head": jnp.asarray(RNG.normal(size=(WIDTH, VOCABULARY)), jnp.float32),
}
TOKENS = RNG.integers(VOCABULARY, size=(2, 3, 5))  # chosen and rejected, 3 pairs
MASK = np.asarray([[[0, 0, 1, 1, 1]] * 3, [[1, 0, 1, 1, 0]] * 3], "f4")
PAIRS = Pairs(*(jnp.asarray(t, jnp.int32) for t in TOKENS), *map(jnp.asarray, MASK))


def model(p, tokens):
    """Causal: the mean of the embeddings so far."""
    h = jnp.cumsum(p["embed"][tokens], axis=1)
    return h / jnp.arange(1.0, tokens.shape[1] + 1)[None, :, None] @ p["head"]


def by_numpy(params, tokens, mask):
    p = {k: np.float64(t) for k, t in params.items()}
    out = []
    for row, counts in zip(tokens, mask, strict=True):
        total = 0.0
        for t in range(1, len(row)):
            logits = p["embed"][row[:t]].mean(0) @ p["head"]
            total += counts[t] * (logits[row[t]] - np.log(np.exp(logits).sum()))
        out.append(total)
    return np.asarray(out)


def adapter():
    a = jl.init(jax.random.key(0), model, PARAMS, PAIRS.chosen, methods={"head": jl.LoRA(2)})
    noisy = {"head": {**a.trainable["head"], "b": jnp.ones((2, VOCABULARY)) * 0.3}}
    return a.replace(trainable=noisy)


def check_value():
    log_probs = scorer(model)
    for a, params in ((None, PARAMS), (adapter(), jl.merge(PARAMS, adapter()))):
        got = log_probs(PARAMS, a, PAIRS)
        for k, name in enumerate(("chosen", "rejected")):
            want = by_numpy(params, TOKENS[k], MASK[k])
            np.testing.assert_allclose(getattr(got, name), want, atol=1e-4)
        np.testing.assert_array_equal(got.chosen_length, [3, 3, 3])
        np.testing.assert_array_equal(got.rejected_length, [2, 2, 2])  # the first is given


def test_answers_by_numpy_with_the_adapter_on_and_off():
    check_value()


def test_what_the_mask_leaves_out_does_not_count():
    logits = model(PARAMS, PAIRS.chosen)
    other = PAIRS.chosen.at[:, -1].set((PAIRS.chosen[:, -1] + 1) % VOCABULARY)
    mask = PAIRS.chosen_mask.at[:, -1].set(0.0)
    got, want = (sequence_log_probs(logits, t, mask) for t in (other, PAIRS.chosen))
    np.testing.assert_array_equal(got, want)
    half = sequence_log_probs(logits.astype(jnp.bfloat16), PAIRS.chosen, mask)
    assert half.dtype == jnp.float32


def test_mutation_logits_that_are_not_shifted(monkeypatch):
    def aligned(logits, tokens, mask):
        found = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
        return jnp.sum(found[..., 0] * mask, axis=-1)

    monkeypatch.setattr(file, "sequence_log_probs", aligned)
    with pytest.raises(AssertionError):
        check_value()
