"""Golden trees of JAX packages with language models: paths, shapes, dtypes, and logits.

Run by a developer where the package is installed (`pip install -e '.[stacks]'`, and for EasyDeL
`pip install -e '.[stacks-easydel]' pytest` in an environment of its own, for MaxText the same with
``stacks-maxtext`` and Python 3.12), from the root:

    python tests/golden/make_stacks.py tunix-llama3 gemma ...

With ``--lora`` the packages' own LoRA is applied instead; what it adds to the tree, and the logits,
go to tests/golden/stacks_lora/NAME.json (in its environment, with KERAS_BACKEND=jax).

It writes tests/golden/stacks/NAME.json: versions, the config of the same model in transformers,
the tree of the tiny model, and its logits with weights that are drawn by their paths (`weight`), as
they are and with a LoRA adapter that is drawn by torch's module names (`factors`).
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FOLDER = Path(__file__).parent / "stacks"
LORA = Path(__file__).parent / "stacks_lora"
IDS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]]
RANK, ALPHA = 2, 3.0
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}  # fmt: skip


class Stack(NamedTuple):
    """A tiny model of a package."""

    packages: tuple[str, ...]
    names: str  # the function of jlora.io
    config: dict[str, Any]  # of transformers, with its `model_type`
    build: Callable[[], tuple[Callable, Any]]  # (fn(params, ids) -> logits, params)


def weight(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight at a path, float32."""
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    return (0.3 * rng.normal(size=shape)).astype(np.float32)


def factors(module: str, d_in: int, d_out: int) -> tuple[np.ndarray, np.ndarray]:
    """(lora_A [r, in], lora_B [out, r]) of a torch module, float32."""
    rng = np.random.default_rng(zlib.crc32(module.encode()))
    return tuple(rng.normal(size=s).astype(np.float32) * 0.3 for s in ((RANK, d_in), (d_out, RANK)))


def _nnx(model: Any, call: Callable) -> tuple[Callable, Any]:
    from flax import nnx

    graph, state = nnx.split(model)
    return lambda params, ids: call(nnx.merge(graph, params), ids), state


def _tunix(kind: str, wrap: Callable = lambda model, *inputs: model):
    def build():
        import importlib

        import jax.numpy as jnp
        from flax import nnx

        module = importlib.import_module(f"tunix.models.{kind}.model")
        sizes = {"num_layers": 2, "embed_dim": 16, "hidden_dim": 20, "num_heads": 4, "head_dim": 6,
                 "num_kv_heads": 2}  # fmt: skip
        if kind == "gemma3":
            own = {"num_embed": 32, "sliding_window_size": 3, "local_base_frequency": 10_000,
                   "global_base_frequency": 1_000_000, "param_dtype": jnp.float32}  # fmt: skip
        else:
            own = {"vocab_size": 32, "rope_theta": 1_000_000, "norm_eps": 1e-6}
        config = module.ModelConfig(**sizes, **own)
        cls = {"llama3": "Llama3", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3": "Gemma3"}[kind]
        model = getattr(module, cls)(config, rngs=nnx.Rngs(0))

        def inputs(ids):
            b, t = ids.shape
            positions = jnp.broadcast_to(jnp.arange(t), (b, t))
            mask = jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), (b, t, t))
            return ids, positions, None, mask

        model = wrap(model, *inputs(jnp.asarray(IDS)))
        return _nnx(model, lambda model, ids: model(*inputs(ids))[0])

    return build


def _gemma(wrap: Callable = lambda model: model):
    import jax
    import jax.numpy as jnp
    from gemma.gm.nn import _config, _modules, _transformer

    local, far = _modules.AttentionType.LOCAL_SLIDING, _modules.AttentionType.GLOBAL
    config = _config.TransformerConfig(
        num_embed=32, embed_dim=16, hidden_dim=20, num_heads=4, head_dim=6, num_kv_heads=2,
        final_logit_softcap=None, use_post_attn_norm=True, use_post_ffw_norm=True,
        attention_types=(local, far), sliding_window_size=3, transpose_gating_einsum=True,
        use_qk_norm=True, local_base_frequency=10_000, global_base_frequency=1_000_000,
    )  # fmt: skip
    model = wrap(_transformer.Transformer(config=config, dtype=jnp.float32))
    params = model.init(jax.random.key(0), jnp.asarray(IDS))["params"]
    return lambda params, ids: model.apply({"params": params}, ids).logits, params


def _keras(kind: str, rank: int = 0) -> Callable[[], tuple[Callable, Any]]:
    def build():
        import os

        os.environ["KERAS_BACKEND"] = "jax"
        import jax.numpy as jnp
        import keras_hub

        sizes = {"vocabulary_size": 32, "num_layers": 2, "num_query_heads": 4, "hidden_dim": 16,
                 "num_key_value_heads": 2}  # fmt: skip
        if kind == "llama":
            net = keras_hub.models.LlamaBackbone(**sizes, intermediate_dim=20)
        elif kind == "qwen":
            net = keras_hub.models.QwenBackbone(
                **sizes, intermediate_dim=20, tie_word_embeddings=False
            )
        elif kind == "qwen3":
            net = keras_hub.models.Qwen3Backbone(
                **sizes, head_dim=6, intermediate_dim=20, tie_word_embeddings=False
            )
        else:
            net = keras_hub.models.GemmaBackbone(**sizes, head_dim=6, intermediate_dim=40)
        if rank:
            net.enable_lora(rank)
            net.trainable = True
        parts = net.trainable_variables, net.non_trainable_variables  # LoRA freezes the kernels
        params = {v.path: v.value for part in parts for v in part}

        def fn(params, ids):
            inputs = {"token_ids": ids, "padding_mask": jnp.ones_like(ids)}
            x, _ = net.stateless_call(*([params[v.path] for v in part] for part in parts), inputs)
            table = params.get("token_embedding/reverse_embeddings")
            return x @ (params["token_embedding/embeddings"].T if table is None else table)

        return fn, params

    return build


def _easydel(rank: int = 0) -> Callable[[], tuple[Callable, Any]]:
    return lambda: _easydel_llama(rank)


def _easydel_llama(rank: int) -> tuple[Callable, Any]:
    import easydel
    import jax.numpy as jnp
    from flax import nnx

    sizes = {k: v for k, v in SIZES.items() if k != "head_dim"}
    config = easydel.LlamaConfig(
        **sizes, head_dim=6, tie_word_embeddings=False, attn_dtype=jnp.float32
    )
    model = easydel.LlamaForCausalLM(
        config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)
    )

    if rank:
        model = model.apply_lora_to_layers(rank, ".*_proj", verbose=False, rngs=nnx.Rngs(1))

    def call(model, ids):
        with config.mesh:
            return model(input_ids=ids).logits

    return _nnx(model, call)


def _maxtext(scan_layers: bool = True, lora: bool = False) -> Callable[[], tuple[Callable, Any]]:
    def build():
        import os

        os.environ["DECOUPLE_GCLOUD"] = "TRUE"
        import jax
        import jax.numpy as jnp
        import maxtext
        from flax import nnx
        from maxtext.common.common_types import MODEL_MODE_TRAIN
        from maxtext.configs import pyconfig
        from maxtext.utils import lora_utils, maxtext_utils, model_creation_utils

        base = Path(maxtext.__file__).parent / "configs" / "decoupled_base_test.yml"
        config = pyconfig.initialize([
            "", str(base), "run_name=t", "log_config=false", "skip_jax_distributed_system=true",
            "decoder_block=qwen3", "use_qk_norm=true", "mlp_activations=['silu','linear']",
            "base_emb_dim=16", "base_num_query_heads=4", "base_num_kv_heads=2", "head_dim=6",
            "base_mlp_dim=20", "base_num_decoder_layers=2", "vocab_size=32", "max_target_length=8",
            "normalization_layer_epsilon=1e-6", "rope_max_timescale=1000000",
            "per_device_batch_size=1", "dtype=float32", "weight_dtype=float32",
            f"scan_layers={str(scan_layers).lower()}", f"lora.enable_lora={str(lora).lower()}",
            f"lora.lora_rank={RANK}", f"lora.lora_alpha={ALPHA}",
        ])  # fmt: skip
        mesh = maxtext_utils.get_mesh_from_config(config)
        with mesh:
            model = model_creation_utils.from_config(config, mesh=mesh, rngs=nnx.Rngs(0))
            model = lora_utils.apply_lora_to_model(model, mesh, config)
        graph, state, rest = nnx.split(model, nnx.Param, ...)

        def fn(params, ids):
            places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
            fresh = jax.tree.map(lambda leaf: leaf, rest)  # the model counts its draws in it
            with mesh:
                return nnx.merge(graph, params, fresh)(
                    ids, places, decoder_segment_ids=jnp.ones_like(ids), enable_dropout=False,
                    model_mode=MODEL_MODE_TRAIN,
                )  # fmt: skip

        return fn, state

    return build


def _llama(**more):
    return {"model_type": "llama", **SIZES, "rms_norm_eps": 1e-6, **more}


_GEMMA3 = {"model_type": "gemma3_text", **SIZES, "sliding_window": 3, "query_pre_attn_scalar": 6,
           "layer_types": ["sliding_attention", "full_attention"], "rms_norm_eps": 1e-6,
           "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0}  # fmt: skip
_LOCAL = _GEMMA3 | {"layer_types": ["sliding_attention"] * 2}  # Tunix: five local ones, one global
_FAR = {"rope_theta": 1_000_000.0}  # Tunix's, whatever its config says
STACKS = {
    "tunix-llama3": Stack(("google-tunix", "flax"), "tunix", _llama(**_FAR), _tunix("llama3")),
    "tunix-qwen2": Stack(
        ("google-tunix", "flax"), "tunix", _llama(model_type="qwen2", **_FAR), _tunix("qwen2")
    ),
    "tunix-qwen3": Stack(
        ("google-tunix", "flax"), "tunix", _llama(model_type="qwen3", **_FAR), _tunix("qwen3")
    ),
    "tunix-gemma3": Stack(("google-tunix", "flax"), "tunix", _LOCAL, _tunix("gemma3")),
    "gemma": Stack(("gemma", "flax"), "gemma", _GEMMA3, _gemma),
    "keras-llama": Stack(
        ("keras", "keras-hub"), "keras_hub", _llama(head_dim=4), _keras("llama")
    ),
    "keras-gemma": Stack(
        ("keras", "keras-hub"), "keras_hub", _llama(model_type="gemma"), _keras("gemma")
    ),
    "keras-qwen": Stack(
        ("keras", "keras-hub"), "keras_hub", _llama(model_type="qwen2", head_dim=4),
        _keras("qwen"),
    ),
    "keras-qwen3": Stack(
        ("keras", "keras-hub"), "keras_hub", _llama(model_type="qwen3"), _keras("qwen3")
    ),
    "easydel-llama": Stack(("easydel", "flax"), "easydel", _llama(), _easydel()),
    "maxtext-qwen3": Stack(
        ("maxtext", "flax"), "maxtext", _llama(model_type="qwen3", **_FAR), _maxtext()
    ),
    "maxtext-qwen3-unscanned": Stack(
        ("maxtext", "flax"), "maxtext", _llama(model_type="qwen3", **_FAR), _maxtext(False)
    ),
}  # fmt: skip


def _gemma_lora(model):
    import jax.numpy as jnp
    from gemma import gm

    return gm.nn.LoRA(rank=RANK, model=model, dtype=jnp.float32)


def _qwix_lora(model, *inputs):
    import qwix
    from flax import nnx

    provider = qwix.LoraProvider(module_path=".*(_proj|_einsum)", rank=RANK, alpha=ALPHA)
    return qwix.apply_lora_to_model(model, provider, *inputs, rngs=nnx.Rngs(0))


WITH_LORA = {  # the packages' own
    "tunix-llama3": _tunix("llama3", _qwix_lora),
    "tunix-gemma3": _tunix("gemma3", _qwix_lora),
    "gemma": lambda: _gemma(_gemma_lora),
    "keras-llama": _keras("llama", RANK),
    "keras-gemma": _keras("gemma", RANK),
    "keras-qwen": _keras("qwen", RANK),
    "keras-qwen3": _keras("qwen3", RANK),
    "easydel-llama": _easydel(RANK),
    "maxtext-qwen3": _maxtext(lora=True),
    "maxtext-qwen3-unscanned": _maxtext(False, lora=True),
}


OPTIONS = {  # of the name map
    "keras-gemma": {"post_norms": False},
    "maxtext-qwen3-unscanned": {"scan_layers": False},
}


def filled(params: Any) -> Any:
    """`params` with the weights of their paths."""
    import jax

    from jlora.core.lift import path_string

    def fill(path, leaf):
        if not jax.numpy.issubdtype(leaf.dtype, np.floating):
            return leaf
        name = path_string(path).replace("/base_module/", "/")  # of a wrapper: as without it
        return jax.numpy.asarray(weight(name, tuple(leaf.shape)), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, params)


def main_lora(wanted: list[str]) -> None:
    """The leaves that the packages' own LoRA adds, and the logits with it."""
    import jax
    import jax.numpy as jnp

    from jlora.core.lift import flatten

    jax.config.update("jax_default_matmul_precision", "highest")
    for name in wanted or WITH_LORA:
        fn, params = WITH_LORA[name]()
        params = filled(params)
        tree = {k: [str(v.dtype), *v.shape] for k, v in sorted(flatten(params)[0].items())
                if "lora" in k.lower()}  # fmt: skip
        logits = np.asarray(fn(params, jnp.asarray(IDS)), np.float64).round(6).tolist()
        by_qwix = name.startswith(("tunix", "maxtext"))
        packages = (*STACKS[name].packages, *(("qwix",) if by_qwix else ()))
        versions = {p: importlib.metadata.version(p) for p in packages}
        LORA.mkdir(exist_ok=True)
        rows = {"versions": versions, "tree": tree, "logits": logits}
        text = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in rows.items())
        (LORA / f"{name}.json").write_text("{\n" + text + "\n}\n", encoding="utf-8")


def main(wanted: list[str]) -> None:
    import tempfile

    import jax
    import jax.numpy as jnp

    from jlora import io, lift, merge
    from jlora.core.lift import flatten
    from tests.io.stacks_test import written

    jax.config.update("jax_default_matmul_precision", "highest")
    for name in wanted or STACKS:
        stack = STACKS[name]
        fn, params = stack.build()
        params, ids = filled(params), jnp.asarray(IDS)
        leaves = {
            k: v for k, v in flatten(params)[0].items() if jnp.issubdtype(v.dtype, jnp.floating)
        }
        names = getattr(io, stack.names)(**OPTIONS.get(name, {}))
        with tempfile.TemporaryDirectory() as folder:
            written(Path(folder), leaves, names)
            adapter = io.load_peft(folder, names, params)
        logits = fn(params, ids)
        adapted = fn(merge(params, adapter), ids)
        lifted = lift(fn)(params, adapter, ids)
        error = jnp.abs(lifted - adapted).max() / jnp.abs(adapted).max()
        print(name, "lifted against merged:", float(error))
        assert error < 1e-5
        tree = {k: [str(v.dtype), *v.shape] for k, v in sorted(leaves.items())}
        data = {
            "versions": {p: importlib.metadata.version(p) for p in stack.packages},
            "config": stack.config,
            "tree": tree,
            "logits": np.asarray(logits, np.float64).round(6).tolist(),
            "adapted": np.asarray(adapted, np.float64).round(6).tolist(),
        }
        FOLDER.mkdir(exist_ok=True)
        text = (
            "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in data.items()) + "\n}"
        )
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    names = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main_lora(names[1:]) if names[:1] == ["--lora"] else main(names)
