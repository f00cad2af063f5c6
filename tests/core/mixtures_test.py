"""Sparse mixtures of EasyDeL and MaxText, the real packages: every expert is adapted.

They group rows by expert (`ragged_dot`), each device its part of the experts (`shard_map`). The
forms by hand are in `views_test.py` and `shards_test.py`. Neither package goes with the other, nor
with the tests' own: `pip install -e '.[stacks-easydel]' pytest`, or `'.[stacks-maxtext]' pytest`
with Python 3.12, each in an environment of its own (and `pytest-timeout pytest-xdist hypothesis`).
Experts split over devices run on no CPU: EasyDeL needs a `ragged_all_to_all`, which XLA lacks
there, and MaxText's own `ragged_dot` fails. Here the mesh splits the data, the columns or fsdp.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from tests.core.conftest import noisy

pytestmark = pytest.mark.filterwarnings("default")  # theirs
IDS = np.tile([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]], (4, 1))
METHODS = {"LoRA": jl.LoRA(2, 4.0), "DoRA": jl.DoRA(2, 4.0)}


@pytest.fixture(autouse=True)
def their_settings():
    """The packages rely on implicit promotion of dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def easydel(kind, moe_method):
    """(fn, params) of a model of one layer and 8 experts, on 4 x 2 devices (data, columns)."""
    package = pytest.importorskip("easydel")
    from flax import nnx

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2,
             "attn_dtype": jnp.float32, "sharding_axis_dims": (4, 1, 1, 2, 1)}  # fmt: skip
    if kind == "Mixtral":
        config = package.MixtralConfig(**sizes, num_local_experts=8, moe_method=moe_method)
    else:
        config = package.Qwen3MoeConfig(
            **sizes, head_dim=6, moe_intermediate_size=24, num_experts=8, decoder_sparse_step=1,
            moe_method=moe_method,
        )  # fmt: skip
    cls = getattr(package, f"{kind}ForCausalLM")
    model = cls(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params, ids):
        with config.mesh:
            return nnx.merge(graph, params, rest)(input_ids=ids).logits

    return fn, params


def maxtext(block, *settings):
    """(fn, params) of a model of two scanned layers and 4 experts, on 8 devices (fsdp)."""
    package = pytest.importorskip("maxtext")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DECOUPLE_GCLOUD", "TRUE")  # of what it does in Google's cloud: nothing
        from flax import nnx
        from maxtext.common.common_types import MODEL_MODE_TRAIN
        from maxtext.configs import pyconfig
        from maxtext.utils import maxtext_utils, model_creation_utils

    base = Path(package.__file__).parent / "configs" / "decoupled_base_test.yml"
    config = pyconfig.initialize([
        "", str(base), "run_name=t", "log_config=false", "skip_jax_distributed_system=true",
        f"decoder_block={block}", "base_emb_dim=16", "base_num_query_heads=4", "head_dim=8",
        "base_num_kv_heads=2", "base_mlp_dim=24", "base_moe_mlp_dim=24", "num_experts=4",
        "base_num_decoder_layers=2", "num_experts_per_tok=2", "vocab_size=32",
        "mlp_activations=['silu','linear']", "max_target_length=8", "per_device_batch_size=1",
        "dtype=float32", "weight_dtype=float32", *settings,
    ])  # fmt: skip
    mesh = maxtext_utils.get_mesh_from_config(config)
    with mesh:
        model = model_creation_utils.from_config(config, mesh=mesh, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    places, documents = jnp.broadcast_to(jnp.arange(8), IDS.shape), jnp.ones(IDS.shape, jnp.int32)

    def fn(params, ids):
        with mesh:
            return nnx.merge(graph, params, rest)(
                ids, places, decoder_segment_ids=documents, enable_dropout=False,
                model_mode=MODEL_MODE_TRAIN,
            )  # fmt: skip

    return fn, params


def differences(fn, params, adapter, on_dense="error"):
    """Largest differences of lifted and merged logits and gradients, over the largest of each."""

    def both(trainable):
        def loss(run, trainable):
            out = run(adapter.replace(trainable=trainable))
            return jnp.sum(jnp.sin(out)), out

        runs = (
            lambda a: jl.lift(fn, on_dense=on_dense)(params, a, IDS),
            lambda a: fn(jl.merge(params, a), IDS),
        )
        return [
            jax.value_and_grad(lambda t, run=run: loss(run, t), has_aux=True)(trainable)
            for run in runs
        ]

    ((_, y1), g1), ((_, y2), g2) = jax.jit(both)(adapter.trainable)
    gradients = zip(jax.tree.leaves(g1), jax.tree.leaves(g2), strict=True)
    size = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(g2))
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(g1))
    moved = float(jnp.abs(y2 - jax.jit(fn)(params, IDS)).max())
    assert moved > 0.1
    error = max(float(jnp.abs(a - b).max()) for a, b in gradients) / size
    return float(jnp.abs(y1 - y2).max() / jnp.abs(y2).max()), error


def experts(adapter):
    """Shapes of the sites with an axis of experts."""
    return sorted(
        site.shape for site, _ in adapter.sites if site.kinds.startswith("s") and site.shape[0] > 2
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_easydel(kind, method):
    fn, params = easydel(kind, "fused_moe")
    text = str(jax.make_jaxpr(fn)(params, IDS))
    assert "ragged_dot_general[" in text and "shard_map[" in text
    adapter = jl.init(jax.random.key(1), fn, params, IDS, methods={"all-linear": METHODS[method]})
    assert experts(adapter) == [(8, 16, 24), (8, 16, 24), (8, 24, 16)]
    value, gradient = differences(fn, params, adapter.replace(trainable=noisy(adapter.trainable)))
    assert value < 3e-6 and gradient < 1e-5


def test_easydel_rounds_to_bfloat16():
    """Without `shard_map` EasyDeL itself rounds the output of experts to bfloat16."""
    fn, params = easydel("Mixtral", "standard_moe")
    adapter = jl.init(jax.random.key(1), fn, params, IDS, methods={"all-linear": jl.LoRA(2, 4.0)})
    assert experts(adapter) == [(8, 16, 24), (8, 16, 24), (8, 24, 16)]
    value, _ = differences(fn, params, adapter.replace(trainable=noisy(adapter.trainable)))
    assert value < 2**-7


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block", ["mixtral", "qwen3_moe"])
def test_maxtext(block, method):
    fn, params = maxtext(block, "megablox=false")
    text = str(jax.make_jaxpr(fn)(params, IDS))
    assert "ragged_dot_general[" in text and "shard_map[" in text
    adapter = jl.init(jax.random.key(1), fn, params, IDS, methods={"all-linear": METHODS[method]})
    assert experts(adapter) == [(4, 2, 16, 24), (4, 2, 16, 24), (4, 2, 24, 16)]
    value, gradient = differences(fn, params, adapter.replace(trainable=noisy(adapter.trainable)))
    assert value < 3e-6 and gradient < 1e-5


def test_maxtext_kernels():
    """Its Pallas kernels hide the weight: refused by name, merged where that is allowed."""
    fn, params = maxtext("mixtral")
    methods = {"all-linear": jl.LoRA(2, 4.0)}
    with pytest.raises(ValueError, match=r"MoeBlock_0/wi_0.*\n?.*pallas_call"):
        jl.init(jax.random.key(1), fn, params, IDS, methods=methods)
    adapter = jl.init(jax.random.key(1), fn, params, IDS, methods=methods, on_dense="merge")
    assert len(experts(adapter)) == 3
    adapter = adapter.replace(trainable=noisy(adapter.trainable))
    value, gradient = differences(fn, params, adapter, on_dense="merge")
    assert value < 3e-6 and gradient < 1e-5
