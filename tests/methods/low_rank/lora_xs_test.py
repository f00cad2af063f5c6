"""LoRA-XS: the core between the weight's own directions."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.methods.low_rank.lora_xs import LoRAXS


def principal(w, rank):
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return u[:, :rank] @ np.diag(s[:rank]) @ vt[:rank]


def check_value(bench):
    adapter = bench.noisy(LoRAXS(rank=3, alpha=6.0))
    p = bench.numbers(adapter)
    bench.agree(adapter, bench.w + 2.0 * p["a"] @ p["core"] @ p["b"], 5e-5)


def test_value(bench):
    check_value(bench)


def test_limit_a_core_of_the_identity_adds_the_principal_part(bench):
    adapter = bench.fresh(LoRAXS(rank=3, alpha=3.0))
    assert {k: v.shape for k, v in adapter.trainable["w"].items()} == {"core": (3, 3)}
    bench.agree(
        adapter.replace(trainable={"w": {"core": jnp.eye(3)}}), bench.w + principal(bench.w, 3)
    )


def test_refusals(bench):
    with pytest.raises(ValueError, match=r"LoRAXS\.rank: got 0, expected an integer of at least 1"):
        LoRAXS(rank=0)
    with pytest.raises(ValueError, match="w: LoRAXS rank: got 9, expected at most 8"):
        bench.fresh(LoRAXS(rank=9))


def test_mutation_the_core_transposed_is_seen(bench, monkeypatch):
    good = LoRAXS.factors
    monkeypatch.setattr(LoRAXS, "factors", lambda self, p: good(self, p | {"core": p["core"].T}))
    with pytest.raises(AssertionError):
        check_value(bench)
