"""What the claims about calibration train and measure, on a model small enough for a test."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims import calibration as claim
from experiments.claims import text_calibration as lib

WIDTH, TOKENS, COUNT = 4, 3, 2 * lib.ROWS


def apply(params, hidden, mask, head):
    """Query and value of one layer; logits along the class vectors."""
    own = params["layers"]["attention"]
    h = jnp.tanh(hidden @ own["query"]["kernel"]) @ own["value"]["kernel"]
    weight = mask.astype(h.dtype)[..., None]
    pooled = jnp.sum(h * weight, axis=1) / jnp.sum(weight, axis=1)
    return jnp.einsum("bd,bcd->bc", pooled, head)


@pytest.fixture
def found(monkeypatch):
    """One task whose labels are those of a direction of the inputs."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(COUNT, TOKENS, WIDTH)).astype("f4")
    label = (hidden.mean(1)[:, 0] > 0).astype("i4")
    rows = jnp.arange(COUNT, dtype=jnp.int32), jnp.asarray(label)
    kernels = {s: {"kernel": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) / 2, jnp.float32)}
               for s in ("query", "value")}  # fmt: skip
    made = lib.Tasks(
        apply, {"layers": {"attention": kernels}}, ("toy",), jnp.asarray(hidden),
        jnp.ones((COUNT, TOKENS), bool), {"toy": jnp.eye(2, WIDTH)},
        {("toy", split): rows for split in ("train", "validation", "test")},
    )  # fmt: skip
    monkeypatch.setattr(lib, "tasks", lambda workdir: made)
    monkeypatch.setattr(lib, "NETWORK", dataclasses.replace(lib.NETWORK, embedding=4, width=16))
    return made


@pytest.mark.parametrize("arm", lib.RATES)
def test_every_arm_learns_and_not_from_shuffled_labels(arm, found, tmp_path):
    rate = 3e-2
    scores, label = lib.logits(arm, rate, "toy", 0, tmp_path, "test")
    lost, _ = lib.logits(arm, rate, "toy", 0, tmp_path, "test", shuffled=True)
    right, wrong = lib.accuracy(scores, label), lib.accuracy(lost, label)
    assert right > 0.72 and right > wrong + 0.1, (right, wrong)
    trained, _ = lib.train(arm, rate, "toy", 0, tmp_path)
    names = {"full fine-tuning": None, "LoRA, A frozen": {"b"}}.get(arm, {"a", "b"})
    if names is None:
        assert jax.tree.structure(trained) == jax.tree.structure(found.base)
    else:
        assert {n for leaves in trained.trainable.values() for n in leaves} == names
        assert set(trained.trainable) == set(lib.SITES)


def test_the_rate_is_an_inner_one_of_the_grid_or_the_record_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(lib, "tasks", lambda workdir: lib.Tasks(
        None, None, ("toy",), None, None, None, None))  # fmt: skip

    def logits(arm, rate, name, seed, workdir, split):
        assert (seed, split) == (lib.TUNING, "validation")
        right = -abs(np.log(rate / best))
        return jnp.asarray([[right, 0.0]] * 2), jnp.zeros(2, jnp.int32)

    monkeypatch.setattr(lib, "logits", logits)
    monkeypatch.setattr(lib, "accuracy", lambda scores, labels: float(scores[0, 0]))
    for arm, factor, edge in (("LoRA", 9.0, False), ("HypeLoRA", 3.0**7, True)):
        best = lib.RATES[arm] * factor
        tuned = lib.tune(arm, tmp_path)
        assert tuned.edge == edge and (edge or tuned.rate == pytest.approx(best))


def test_the_claims_compare_what_they_say(monkeypatch, tmp_path):
    def run(arm, seed, workdir, shuffled=False):
        value = {"LoRA": 0.2, "full fine-tuning": 0.3, "LoRA, A frozen": 0.15}.get(arm, 0.4)
        each = dict.fromkeys(lib.calibration.Calibration._fields, (value, value))
        return lib.Result((1 - value, 1 - value), each, (0.9, 0.9))

    monkeypatch.setattr(lib, "run", run)
    monkeypatch.setattr(lib, "tune", lambda arm, workdir: lib.Tuned(0.1, False))
    monkeypatch.setattr(lib, "tasks", lambda workdir: lib.Tasks(
        None, None, ("s", "t"), None, None, None, None))  # fmt: skip
    found = claim.run(0, tmp_path)
    assert (found.system, found.baseline, found.control) == ((0.2,) * 2, (0.3,) * 2, (0.9,) * 2)
    assert found.more["A frozen minus LoRA: ece"] == pytest.approx(-0.05)
    assert found.more["A frozen minus LoRA: accuracy"] == pytest.approx(0.05)
    assert found.more["HypeLoRA: accuracy"] == pytest.approx(0.6)
