"""Layers that are chosen on a decoder: what is trained, what a search prefers, what is judged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims import decoder_layers as lib
from experiments.claims import diffora, flexora
from experiments.variant_study import bench, continuation
from jlora.models import decoder
from jlora.schedules import diffora as modules


@pytest.fixture(scope="module")
def tiny():
    """A decoder of two layers; two kinds of text, steps of 1 and of 3 from token to token."""
    config = decoder.DecoderConfig(
        "llama", vocab=12, layers=2, width=16, heads=2, kv_heads=1, head_width=8, ffn=16,
        max_positions=16, tied=True, init_std=0.3,
    )  # fmt: skip
    start = np.arange(24)[:, None]
    rows = {split: np.stack([(start + n + k * np.arange(9)) % 12 for k in (1, 3)])
            for n, split in enumerate(("train", "validation", "test"))}  # fmt: skip
    params = decoder.init(jax.random.key(0), config)
    one = bench.of_rows("tiny", continuation.logits(config), params, rows, ("one", "three"), "k")
    patch = pytest.MonkeyPatch()
    for name, value in {
        "ROWS": 24,
        "HELD": 8,
        "STEPS": 30,
        "SEARCH": 8,
        "RATES": (1e-5, 3e-2),
    }.items():
        patch.setattr(lib, name, value)
    patch.setattr(lib, "bench", lambda: one)
    lib.rows.cache_clear()
    yield one
    patch.undo()
    lib.rows.cache_clear()


def test_what_is_not_chosen_is_not_trained_and_the_better_rate_is_taken(tiny):
    adapter = lib.fresh(2, 0)
    layers = {site.path: (0, 1) for site, _ in adapter.sites}
    half = lib.kept(adapter, np.asarray([True, False]), layers)
    fixed = tiny.apply, adapter.sites, tiny.base
    train = jnp.asarray(lib.rows("train")[0])
    after = lib._fit(*fixed, half.trainable, half.frozen, jnp.asarray(lib.RATES), train,
                     jax.random.key(0))  # fmt: skip
    for path, own in half.trainable.items():
        moved = np.abs(np.asarray(after[path]["b"][1] - own["b"]))
        assert moved[0].max() > 1e-2 and moved[1].max() == 0
    loss, rate = lib.tuned(half, 0, 0)
    nothing = lib.tuned(lib.kept(adapter, np.asarray([False, False]), layers), 0, 0)[0]
    assert rate == 3e-2 and loss < nothing - 0.5


def test_a_search_finds_the_kernels_that_are_not_hidden(tiny):
    adapter = lib.fresh(2, 0)
    places = modules.modules(adapter)
    size = 1 + max(n for numbers in places.values() for n in numbers)
    there = np.arange(size) % 2 == 0
    logits = lib.search(
        lib.kept(adapter, there, places), places, 1, 0, diffora.slope, diffora.shown
    )
    assert logits.shape == (size,) and (logits[~there] == 0).all() and (logits[there] != 0).all()


def test_halves_by_chance_differ_by_draw_kind_and_seed():
    draws = [lib.at_random(42, 21, *at) for at in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert all(d.sum() == 21 for d in draws) and len({d.tobytes() for d in draws}) == 4


def test_figures_compare_halves_with_all_and_with_chance(tiny, monkeypatch):
    def tuned(adapter, kind, seed):
        scales = np.concatenate([np.ravel(a["scale"]) for a in adapter.frozen.values()])
        rank = adapter.trainable[adapter.sites[0][0].path]["a"].shape[-1]
        return float(100 * scales.mean() + rank + kind), 0.5

    chosen = np.asarray([0.0, 1.0])
    monkeypatch.setattr(lib, "tuned", tuned)
    monkeypatch.setattr(lib, "search", lambda a, places, *more: np.resize(
        chosen, 1 + max(n for v in places.values() for n in v)))  # fmt: skip
    for file in (flexora, diffora):
        monkeypatch.setattr(file, "KINDS", ("one", "three"))
        got = file.run(0, None)
        full = 108.0 if file is flexora else 104.0
        np.testing.assert_allclose(got[1], (58, 59))
        np.testing.assert_allclose(got[2], (full, full + 1))
        np.testing.assert_allclose(got[3], (58, 59))
