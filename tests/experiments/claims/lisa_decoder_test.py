"""LISA on a decoder: which layers move, what the control reads, sizes of states."""

import numpy as np

from experiments.claims import decoder_domains as lib
from experiments.claims import lisa_decoder as file


def test_one_layer_moves_in_an_interval_and_the_embeddings_always(domains, monkeypatch):
    monkeypatch.setattr(file, "LAST", 2)
    made, loss = file.trained.__wrapped__("LISA", 1e-2, 0, steps=file.INTERVAL)
    assert np.isfinite(loss)
    assert file.still(domains.params, made) == domains.config.layers - file.SLOTS == 1
    assert file.still(domains.params, domains.params) == domains.config.layers
    for name in ("embed_tokens", "norm"):
        before, after = (next(iter(p[name].values())) for p in (domains.params, made))
        assert np.abs(np.asarray(after - before)).max() > 1e-3
    by_kind = file.measured(made)
    assert by_kind.shape == (3,) and by_kind.mean() < file.measured(domains.params).mean()


def test_rows_of_the_control_have_the_same_tokens_in_another_order(domains):
    plain, mixed = (file.batch(1, 2, scrambled) for scrambled in (False, True))
    assert plain.shape == (file.BATCH, lib.SEGMENT * lib.SEGMENTS + 1)
    np.testing.assert_array_equal(np.sort(plain, 1), np.sort(mixed, 1))
    assert (plain != mixed).any()
    step = (plain[:, 1:] - plain[:, :-1] - 2 * (plain[:, 1:] // 8) - 1) % 8
    assert (step == 0).all()  # rows of one kind, as they are read


def test_states_hold_moments_of_the_slots_alone(domains):
    layers = sum(x.size for x in _leaves(domains.params["layers"]))
    rest = sum(x.size for x in _leaves(domains.params)) - layers
    slots = 2 * (rest + layers * file.SLOTS // domains.config.layers)
    assert 0 <= file.state_size("LISA") - slots <= 8  # step, key and numbers of the layers
    assert file.state_size("all") == 2 * (rest + layers) + 1


def _leaves(tree):
    return [x for v in tree.values() for x in (_leaves(v) if isinstance(v, dict) else [v])]
