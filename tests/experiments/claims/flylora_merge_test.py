"""The merge of FlyLoRA: one A or many, the mean of adapters, what is tuned and what is measured."""

import jax
import numpy as np
import pytest

import jlora as jl
from experiments.claims import decoder_domains as domains_lib
from experiments.claims import decoder_training as lib
from experiments.claims import flylora_merge as file
from jlora.methods import FlyLoRA


@pytest.fixture
def own(domains, monkeypatch):
    """Adapters of the three kinds by each method, all as they are after training."""
    fly = FlyLoRA(4, 2, alpha=8.0)
    monkeypatch.setattr(file, "METHODS", {"FlyLoRA": fly, "LoRA": jl.LoRA(2), file.ALONE: fly})
    monkeypatch.setattr(lib, "STEPS", 40)
    file.own.cache_clear()
    rates = {"FlyLoRA": 5e-2, "LoRA": 2e-2, file.ALONE: 5e-2}
    yield {n: [file.own(n, d, rate, 1) for d in range(3)] for n, rate in rates.items()}
    file.own.cache_clear()


def test_adapters_learn_their_kind_share_a_where_they_should_and_merge_by_means(domains, own):
    at, path = domains.test, "layers/ffn/up/kernel"
    base = lib.by_kind(domains_lib.measured(None, at)[0], at)
    for name, every in own.items():
        loss = [lib.by_kind(lib.measured(a, at), at)[d] for d, a in enumerate(every)]
        assert (np.asarray(loss) < base - 0.3).all()
        a = [np.asarray(x.frozen[path].get("a", 0)) for x in every]
        assert (a[0] == a[1]).all() == (name != file.ALONE)
    assert np.abs(np.asarray(own["FlyLoRA"][0].frozen[path]["bias"])).max() > 0
    merged = file.merged("FlyLoRA", own["FlyLoRA"], 2.0)
    mean = sum(np.asarray(a.trainable[path]["b"]) for a in own["FlyLoRA"]) / 3
    np.testing.assert_allclose(merged.trainable[path]["b"], mean, rtol=1e-6)
    scale = np.asarray(own["FlyLoRA"][0].frozen[path]["scale"])
    np.testing.assert_allclose(merged.frozen[path]["scale"], 2 * scale, rtol=1e-6)
    params = [jl.merge(domains.params, a) for a in own["LoRA"]]
    want = jax.tree.map(lambda *xs: sum(xs) / 3, *params)
    got = jl.merge(domains.params, file.merged("LoRA", own["LoRA"], 1.0))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_the_factor_is_chosen_on_validation_rows_and_figures_are_differences(domains, monkeypatch):
    kept = {"FlyLoRA": 0.1, "LoRA": 0.2, file.ALONE: 0.5}
    monkeypatch.setattr(domains_lib, "NAMES", ("one", "two", "three"))
    monkeypatch.setattr(file, "own", lambda name, kind, rate, seed: (name, kind))
    monkeypatch.setattr(file, "rate_of", lambda name: {"FlyLoRA": 1.0, "LoRA": 2.0}[name])
    monkeypatch.setattr(file, "merged", lambda name, every, factor: (name, factor))

    def measured(what, at):
        own = isinstance(what[1], int)
        test = 0.4 if own else kept[what[0]] + 0.4
        value = test if at is domains.test else (what[1] - 1.4) ** 2
        return np.full((len(at.ids), at.ids.shape[1] - 1), value)

    monkeypatch.setattr(lib, "measured", measured)
    got = file.run(0, None)
    assert got.more["FlyLoRA: factor"] == 1.5 and got.units == ("one", "two", "three")
    for side, name in zip(got[1:4], file.METHODS, strict=True):
        assert side == pytest.approx([kept[name]] * 3)
    assert got.more["LoRA: rate"] == 2.0 and f"{file.ALONE}: rate" not in got.more
