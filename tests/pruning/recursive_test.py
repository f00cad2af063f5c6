"""Tied layers with LoRA per depth: exact at full rank, tails of singular values below it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.models import decoder
from jlora.models.decoder import loops
from jlora.pruning.recursive import STARTS, by_depth, looped, relaxed, tied

CONFIG = decoder.DecoderConfig(
    "llama", vocab=20, layers=6, width=8, heads=2, kv_heads=1, head_width=4, ffn=12,
    max_positions=8, tied=True, init_std=0.3,
)  # fmt: skip
KERNELS = r"layers/(attention|ffn)/\w+/kernel"
IDS = np.random.default_rng(0).integers(0, 20, (2, 8)).astype(np.int32)
RUN = functools.partial(decoder.forward, config=CONFIG)
FULL = 4  # the smallest side of a kernel: of keys and values


@pytest.fixture(scope="module")
def params():
    """A decoder whose norms differ from layer to layer too."""
    found = decoder.init(jax.random.key(0), CONFIG)
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + jnp.float32(0.1 * draw.normal(size=x.shape)), found)


def adapter_of(params, shared, rank):
    whole = looped(shared, CONFIG.layers)
    fresh = jl.init(jax.random.key(1), RUN, whole, IDS, methods={KERNELS: jl.LoRA(rank, alpha=3.0)})
    return relaxed(fresh, params, shared)


def kernels(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(k, simple=True, separator="/"): np.asarray(v) for k, v in leaves}
    return {k: v for k, v in named.items() if "kernel" in k}


@pytest.fixture(scope="module")
def errors(params):
    """rank -> by kernel, the squared error of every layer; and the singular values of the rest."""
    shared = tied(params, 2)
    found = {}
    for rank in (1, 2, FULL):
        merged = jl.merge(looped(shared, 6), adapter_of(params, shared, rank))
        old, new = kernels(params), kernels(merged)
        found[rank] = {k: ((new[k] - old[k]) ** 2).sum((1, 2)) for k in old}
    return found


def test_errors_are_the_tails_of_the_singular_values(params, errors):
    for name, w in kernels(params).items():
        mean = [np.mean([w[layer] for layer in range(6) if layer % 2 == k], axis=0) for k in (0, 1)]
        sigma = np.stack(
            [np.linalg.svd(w[l] - mean[l % 2], compute_uv=False) for l in range(6)]  # noqa: E741
        )
        for rank in (1, 2, FULL):
            want = (sigma[:, rank:] ** 2).sum(-1)
            np.testing.assert_allclose(errors[rank][name], want, rtol=1e-3, atol=1e-6)
            halves = [np.mean(w[3 * k : 3 * k + 3], axis=0) for k in (0, 1)]
            other = np.linalg.svd(w[1] - halves[0], compute_uv=False)
            wrong = (other[rank:] ** 2).sum()
            assert rank == FULL or abs(wrong - errors[rank][name][1]) > 1e-3, (
                "mutation: neighbours share, not every second layer"
            )


def test_full_rank_is_the_original_model_and_rank_one_is_not(params):
    shared, narrow = tied(params, 3, "lower"), {}
    run = jax.jit(RUN)
    want = run(params, IDS).logits
    for rank in (1, 8):
        sites = {KERNELS: jl.LoRA(rank, alpha=3.0)}
        if rank == 8:  # keys and values have four outputs
            sites = {r"layers/attention/(key|value)/kernel": jl.LoRA(4, alpha=3.0)} | {
                r"layers/(attention/(query|out)|ffn/\w+)/kernel": jl.LoRA(8, alpha=3.0)
            }
        whole = looped(shared, 6)
        fresh = jl.init(jax.random.key(1), RUN, whole, IDS, methods=sites)
        narrow[rank] = run(jl.merge(whole, relaxed(fresh, params, shared)), IDS).logits
    np.testing.assert_allclose(narrow[8], want, atol=2e-4)
    assert np.abs(narrow[1] - want).max() > 0.05


def test_a_bank_by_depth_is_the_adapter_run_by_run(params):
    shared = tied(params, 2)
    adapter = adapter_of(params, shared, 2)
    bank, run = by_depth(adapter, 2), jax.jit(functools.partial(loops.exits, config=CONFIG))
    merged = jl.merge(looped(shared, 6), adapter)
    after = run(shared, bank, IDS)
    np.testing.assert_allclose(after[-1], jax.jit(RUN)(merged, IDS).logits, atol=1e-5)
    config = dataclasses.replace(CONFIG, layers=4)
    short = jax.jit(functools.partial(decoder.forward, config=config))
    first = {**merged, "layers": jax.tree.map(lambda t: t[:4], merged["layers"])}
    np.testing.assert_allclose(after[1], short(first, IDS).logits, atol=1e-5)
    turned = jax.tree.map(lambda t: t[::-1], bank)
    assert np.abs(run(shared, turned, IDS)[0] - after[0]).max() > 1e-2, "mutation: other depths"
    name, own = next(iter(adapter.trainable.items()))
    np.testing.assert_array_equal(bank[1].trainable[name]["a"], own["a"][2:4])


def test_the_average_leaves_least_and_the_starts_are_the_named_layers(params):
    left = {}
    for start in STARTS:
        whole = kernels(looped(tied(params, 2, start), 6))
        left[start] = sum(((whole[k] - w) ** 2).sum() for k, w in kernels(params).items())
    assert min(left, key=left.get) == "average"
    name, w = next(iter(kernels(params).items()))
    for blocks, start, layers in ((3, "stepwise", [0, 2, 5]), (3, "lower", [0, 1, 2])):
        np.testing.assert_array_equal(kernels(tied(params, blocks, start))[name], w[layers])
    assert tied(params, 6, "stepwise").keys() == params.keys()


def test_norms_stay_per_layer_and_a_shared_kernel_learns_from_every_loop(params):
    shared = tied(params, 2)
    norm = shared["layers"]["input_layernorm"]["scale"]
    np.testing.assert_array_equal(norm, params["layers"]["input_layernorm"]["scale"])
    weight = jnp.arange(1.0, 7.0).reshape(6, 1, 1)

    def total(shared):
        return jnp.sum(weight * looped(shared, 6)["layers"]["ffn"]["up"]["kernel"])

    grads = jax.grad(total)(shared)["layers"]["ffn"]["up"]["kernel"]
    np.testing.assert_allclose(grads[0], 1 + 3 + 5)
    np.testing.assert_allclose(grads[1], 2 + 4 + 6)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda p: tied(p, 4), "blocks: got 4, expected a divisor of 6"),
        (lambda p: tied(p, 2, "upper"), "start: got 'upper'"),
        (lambda p: tied(p, 2, stack="blocks/.*"), "stack: got 0 leaves"),
        (lambda p: looped(tied(p, 2), 5), "expected a divisor of 5"),
        (lambda p: by_depth(adapter_of(p, tied(p, 2), 1), 4), "blocks: got 4"),
        (lambda p: adapter_of(p, tied(p, 2), 9), "rank: got 9, expected at most 4"),
    ],
)
def test_what_cannot_work_is_an_error(params, wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong(params)
