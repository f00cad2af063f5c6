"""FlexLoRA: the best approximation of the average at every client's rank."""

import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.federated import flexlora as flexlora_file
from jlora.federated.fedavg import fedavg
from jlora.federated.flexlora import flexlora
from jlora.federated.hetlora import hetlora


def dense(x):
    return np.asarray(x.u, "f8") @ np.asarray(x.v, "f8")


def average(u, v, p):
    return np.einsum("n,nir,nro->io", p.astype("f8"), u, v)


def error(x, truth):
    return np.linalg.norm(dense(x) - truth) / np.linalg.norm(truth)


def test_flexlora_gives_each_client_the_best_of_its_rank(clients):
    bank, u, v, p = clients((1, 4, 2))
    ranks = (1, 4, 2)
    out, truth = flexlora(bank, p, ranks=ranks), average(u, v, p)
    left, s, right = np.linalg.svd(truth)
    for k, r in enumerate(ranks):
        best = left[:, :r] * s[:r] @ right[:r]
        np.testing.assert_allclose(dense(LowRank(out.u[k], out.v[k])), best, atol=1e-5)
        assert np.all(np.asarray(out.u[k][:, r:]) == 0) and np.all(np.asarray(out.v[k][r:]) == 0)
    padded = hetlora(bank, p)
    full = flexlora(bank, p, ranks=(4,))
    assert error(LowRank(full.u[0], full.v[0]), truth) < error(padded, truth)
    with pytest.raises(ValueError, match="ranks"):
        flexlora(bank, p, ranks=(1, 0))


def test_where_the_rank_suffices_every_client_gets_the_average(clients):
    bank, u, v, p = clients((2, 2))
    out = flexlora(bank, p, ranks=(4, 6))
    for k in range(2):
        got = dense(LowRank(out.u[k], out.v[k]))
        np.testing.assert_allclose(got, average(u, v, p), atol=1e-5)


def test_mutation_the_svd_of_averaged_factors(clients, monkeypatch):
    monkeypatch.setattr(flexlora_file, "concat", fedavg)
    with pytest.raises(AssertionError):
        test_flexlora_gives_each_client_the_best_of_its_rank(clients)
