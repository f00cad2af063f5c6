"""Stage `evaluate`: accuracies and overlaps of mistakes by hand, Gram matrices of dense deltas."""

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.stages import accuracy, codec, evaluate


def test_scores_and_overlaps_are_those_of_the_right_and_wrong_texts(monkeypatch):
    right = np.array([[1, 1, 0, 0], [1, 0, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]], bool)
    monkeypatch.setattr(accuracy, "correct", lambda world, encoded, task, tokens: right)
    found = {"trained": np.zeros((2, 1, 1)), "generated": np.zeros((2, 1, 1))}
    scores, overlap = evaluate.score(None, None, "task", found)
    assert scores == {"trained": [0.5, 0.5], "generated": [0.75, 1.0]}
    # Mistakes: trained {2, 3} and {1, 2}, generated {0} and none.
    assert overlap == {"generated": [0.0, 0.0], "trained": [1 / 3, 1 / 3]}


def test_gram_matrices_are_those_of_the_dense_deltas(tiny_world, tiny_encoded):
    x = tiny_encoded.x[:3]

    def dense(tokens):
        adapter = tiny_encoded.template.replace(
            trainable=codec.to_trainable(tiny_encoded, jnp.asarray(tokens))
        )
        deltas = jl.delta(tiny_world.upper, adapter)
        return np.concatenate(
            [np.asarray(v, np.float64).ravel() for _, v in sorted(deltas.items())]
        )

    flat = np.stack([dense(one) for one in x])
    scale = np.abs(flat @ flat.T).max()
    np.testing.assert_allclose(evaluate.grams(tiny_encoded, x), flat @ flat.T, atol=1e-5 * scale)
    np.testing.assert_allclose(
        evaluate.grams(tiny_encoded, x[:2], x), flat[:2] @ flat.T, atol=1e-5 * scale
    )


def test_the_base_is_an_adapter_that_changes_nothing(tiny_world, tiny_encoded):
    tokens = evaluate.base_tokens(tiny_encoded)
    assert tokens.shape == (1, *tiny_encoded.x.shape[1:])
    trainable = codec.to_trainable(tiny_encoded, jnp.asarray(tokens[0]))
    deltas = jl.delta(tiny_world.upper, tiny_encoded.template.replace(trainable=trainable))
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(deltas))
