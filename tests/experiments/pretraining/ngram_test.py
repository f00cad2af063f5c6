"""The n-gram model by a recursion over dictionaries."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from experiments.pretraining import ngram

VOCAB = 5
DRAW = np.random.default_rng(0)
TRAIN = DRAW.choice(VOCAB, 60, p=[0.4, 0.3, 0.2, 0.08, 0.02])
HELD_OUT = DRAW.choice(VOCAB, 12)


def model(order):
    """p(token, context) of the docstring's equation, one token at a time."""
    text = TRAIN.tolist()
    grams = lambda n: [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]  # noqa: E731
    counts = {order: Counter(grams(order))}
    for n in range(1, order):
        before = defaultdict(set)
        for gram in grams(n + 1):
            before[gram[1:]].add(gram[0])
        counts[n] = Counter({gram: len(found) for gram, found in before.items()})

    def p(token, context, n):
        if n == 0:
            return 1 / VOCAB
        lower = p(token, context[1:], n - 1)
        c = counts[n]
        own = {g: k for g, k in c.items() if g[:-1] == context}
        if not own:
            return lower
        once, twice = (sum(k == m for k in c.values()) for m in (1, 2))
        discount = once / (once + 2 * twice) if once else 0
        total = sum(own.values())
        return max(c[(*context, token)] - discount, 0) / total + discount * len(own) / total * lower

    return p


@pytest.mark.parametrize("order", [1, 2, 3])
def test_value_by_a_recursion_over_dictionaries(order):
    p, text = model(order), HELD_OUT.tolist()
    want = []
    for i, token in enumerate(text):
        n = min(order, i + 1)
        context = tuple(text[i - n + 1 : i])
        assert abs(sum(p(t, context, n) for t in range(VOCAB)) - 1) < 1e-12
        want.append(-np.log(p(token, context, n)))
    np.testing.assert_allclose(ngram.interpolated(TRAIN, HELD_OUT, VOCAB, order), want, atol=1e-12)


def test_a_text_with_an_order_is_predicted_by_it_and_a_shuffled_one_is_not():
    text = np.tile(np.arange(VOCAB), 40)
    nats = ngram.interpolated(text, text[:20], VOCAB, 3)[2:].mean()
    assert nats < 0.1 < ngram.unigram(text, text[:20], VOCAB).mean() == pytest.approx(np.log(VOCAB))
    mixed = np.random.default_rng(1).permutation(text)
    assert ngram.interpolated(mixed, mixed[:20], VOCAB, 3).mean() > 0.5, "mutation: no order"


def test_n_grams_that_do_not_fit_an_integer_are_refused():
    with pytest.raises(ValueError, match="order: got 9 of 4096 tokens"):
        ngram.interpolated(TRAIN, HELD_OUT, 4096, 9)
