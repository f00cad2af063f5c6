"""PEFT's `add_weighted_adapter` on torch models: factors bit for bit, its SVDs by product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.algebra import LowRank
from jlora.io.torch_random import Generator
from jlora.merging import gather
from jlora.merging.engine.streamed import Solver
from jlora.merging.peft import svd as peft_svd
from jlora.merging.peft.combine import peft_merge

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

SIZES = {"0": (24, 16), "2": (16, 8)}  # name -> d_in, d_out
ALPHAS, RANK = (8.0, 2.0, 6.0), 4  # scales 2, 1/2, 3/2
W = [0.7, -0.4, 0.9]
NAMES = ["first", "second", "third"]


@pytest.fixture(scope="module")
def model():
    """Three LoRA adapters with random factors on two linear layers."""
    base = torch.nn.Sequential(
        torch.nn.Linear(*SIZES["0"]), torch.nn.ReLU(), torch.nn.Linear(*SIZES["2"])
    )
    made = None
    for k, name in enumerate(NAMES):
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHAS[k], target_modules=["0", "2"])
        made = peft.get_peft_model(base, config, name) if k == 0 else made
        if k:
            made.add_adapter(name, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator))
    return made


def factors(model, layer, name):
    """(a [d_in, r], b [r, d_out]) of an adapter, as numpy."""
    module = model.base_model.model[int(layer)]
    return (module.lora_A[name].weight.detach().numpy().T.copy(),
            module.lora_B[name].weight.detach().numpy().T.copy())  # fmt: skip


@pytest.fixture(scope="module")
def adapters(model):
    """The same three, ours."""
    params = {layer: jnp.zeros(size) for layer, size in SIZES.items()}

    def run(p, x):
        return jax.nn.relu(x @ p["0"]) @ p["2"]

    def one(name, alpha):
        fresh = jl.init(jax.random.key(0), run, params, jnp.ones((1, 24)),
                        methods={".*": jl.LoRA(RANK, alpha)})  # fmt: skip
        arrays = {s: dict(zip("ab", map(jnp.asarray, factors(model, s, name)), strict=True))
                  for s in SIZES}  # fmt: skip
        return fresh.replace(trainable=arrays)

    return [one(name, alpha) for name, alpha in zip(NAMES, ALPHAS, strict=True)]


def theirs(model, kind, record=None, **options):
    """PEFT's merge, {layer: (a, b)}; masks that it draws are appended to `record`."""
    new = f"merged{len(model.peft_config)}"
    real = torch.bernoulli

    def seeded(p):
        torch.manual_seed(1000 + len(record))
        record.append(real(p).numpy())
        return torch.from_numpy(record[-1])

    try:
        torch.bernoulli = seeded if record is not None else real
        model.add_weighted_adapter(NAMES, W, new, combination_type=kind, **options)
    finally:
        torch.bernoulli = real
    out = {layer: factors(model, layer, new) for layer in SIZES}
    model.delete_adapter(new)
    return out


def same_bits(adapter, expected):
    for layer, (a, b) in expected.items():
        got = adapter.trainable[layer]
        np.testing.assert_array_equal(np.asarray(got["a"]), a)
        np.testing.assert_array_equal(np.asarray(got["b"]), b)


CASES = {
    "linear": {},
    "cat": {},
    "magnitude_prune": {"density": 0.3},
    "ties": {"density": 0.4},
}


@pytest.mark.parametrize("kind", CASES)
def test_factors_bit_for_bit(model, adapters, kind):
    expected = theirs(model, kind, **CASES[kind])
    same_bits(peft_merge(kind, adapters, W, options=CASES[kind]), expected)


@pytest.mark.parametrize("kind", CASES)
def test_jitted_bit_for_bit(model, adapters, kind):
    @jax.jit
    def run(factors):
        new = [a.replace(trainable=t) for a, t in zip(adapters, factors, strict=True)]
        return peft_merge(kind, new, W, options=CASES[kind])

    same_bits(run([a.trainable for a in adapters]), theirs(model, kind, **CASES[kind]))


def test_frequency_vote_bit_for_bit(model, adapters):
    expected = theirs(model, "ties", density=0.4, majority_sign_method="frequency")
    options = {"density": 0.4, "vote": "frequency"}
    same_bits(peft_merge("ties", adapters, W, options=options), expected)


def masks_of(record):
    """PEFT draws, a layer at a time, the masks of all lora_A, then of all lora_B."""
    out, n = {}, len(NAMES)
    for k, layer in enumerate(SIZES):
        a, b = (record[(2 * k + side) * n : (2 * k + side + 1) * n] for side in (0, 1))
        out[layer] = LowRank(*(jnp.asarray(np.stack([m.T for m in ms])) for ms in (a, b)))
    return out


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_random_factors_bit_for_bit_given_the_masks(model, adapters, kind):
    record = []
    expected = theirs(model, kind, record, density=0.4)
    assert len(record) == 2 * len(SIZES) * len(NAMES)
    for k, mask in enumerate(record):  # torch's masks, without torch
        ours = Generator(1000 + k).uniform(mask.shape, 0.0, 1.0) < np.float32(0.4)
        np.testing.assert_array_equal(ours, mask)
    got = peft_merge(kind, adapters, W, options={"density": 0.4}, masks=masks_of(record))
    same_bits(got, expected)


SVD = {
    "svd": {},
    "magnitude_prune_svd": {"density": 0.3},
    "ties_svd": {"density": 0.4},
    "dare_linear_svd": {"density": 0.4},
    "dare_ties_svd": {"density": 0.4},
}


def check_product(model, adapters, kind, w):
    record = []
    expected = theirs(model, kind, record, svd_rank=6, **SVD[kind])
    bank = gather(adapters, w)
    method = getattr(peft_svd, f"peft_{kind}")
    for k, layer in enumerate(SIZES):
        options = dict(SVD[kind])
        if kind != "svd":
            options["solver"] = Solver(oversample=16)  # an exact SVD of what is streamed
        if record:
            mine = record[k * len(NAMES) : (k + 1) * len(NAMES)]
            options |= {"keys": None, "masks": jnp.asarray(np.stack([m.T for m in mine]))}
        low = jax.jit(lambda b, w, o=options: method(b, w, rank=6, **o))(
            bank.bank[layer], bank.weights
        )
        a, b = expected[layer]
        np.testing.assert_allclose(low.u @ low.v, a @ b, rtol=1e-3, atol=2e-4 * np.abs(a @ b).max())


@pytest.mark.parametrize("kind", SVD)
def test_svds_by_product(model, adapters, kind):
    check_product(model, adapters, kind, W)


def test_mutation_other_weights(model, adapters):
    with pytest.raises(AssertionError):
        check_product(model, adapters, "ties_svd", [0.7, 0.4, 0.9])
    with pytest.raises(AssertionError):
        same_bits(peft_merge("linear", adapters, [0.7, -0.4, 0.8999999]), theirs(model, "linear"))


def test_errors(adapters):
    with pytest.raises(ValueError, match="kind: got 'svd'"):
        peft_merge("svd", adapters, W)
    with pytest.raises(ValueError, match="weights: got 2, expected 3"):
        peft_merge("linear", adapters, W[:2])
