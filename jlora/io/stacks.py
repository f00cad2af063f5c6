r"""Name maps of JAX packages that have language models of their own, to transformers' names.

=================  ====================================================  =========================
map                parameters                                            torch model
=================  ====================================================  =========================
`gemma`            google-deepmind ``gemma``, Flax Linen                 ``Gemma2ForCausalLM``,
                                                                         ``Gemma3ForCausalLM``
`tunix`            ``google-tunix``: llama3, qwen2, qwen3, gemma3; NNX   ``LlamaForCausalLM``, ...
`keras_hub`        KerasHub's Llama, Qwen and Gemma backbones, JAX      ``LlamaForCausalLM``, ...
`easydel`          EasyDeL: transformers' own names, NNX                 any of its causal models
`maxtext`          MaxText: Qwen 3 (dense), scanned layers or not, NNX   ``Qwen3ForCausalLM``
=================  ====================================================  =========================

Paths are those of the parameters: the tree under ``params`` of Linen, the state of
``nnx.split(model, nnx.Param, ...)``, ``{v.path: v.value for v in model.trainable_variables}`` of
Keras. Each rule says the layout of its weight, so that parameters may be given instead of sites;
multi-head weights lie as heads x features, which is transformers' order, and rotary positions pair
the halves of a head in all of them.
"""

from jlora.io.names import NameMap

Rules = dict[str, str | tuple[str, str]]
LAYER = "model.layers.{i}"
# Gemma's norms around attention and feed-forward -> transformers'.
NORMS = {
    "pre_attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _vectors(start: str, leaf: str, names: dict[str, str]) -> Rules:
    """Norms below `start`, whose scale is called `leaf`, as weights of torch modules."""
    return {
        f"{start}{path}/{leaf}": (f"{LAYER}.{module}[weight]", "o")
        for path, module in names.items()
    }


def _gemma_attention(layer: str) -> Rules:
    """Attention of Gemma as google-deepmind wrote it, and Tunix after it."""
    out = f"{LAYER}.self_attn"
    heads = {"_query_norm": "self_attn.q_norm", "_key_norm": "self_attn.k_norm"}
    return {
        layer + "attn/q_einsum/w": (f"{out}.q_proj", "oio"),
        layer + "attn/kv_einsum/w": (f"{out}.{{k_proj|v_proj}}", "soio"),
        layer + "attn/qkv_einsum/w": (f"{out}.{{q_proj|k_proj|v_proj}}", "soio"),
        layer + "attn/attn_vec_einsum/w": (f"{out}.o_proj", "iio"),
        **_vectors(layer + "attn/", "(?:scale|w)", heads),
    }


def gemma(prefix: str = "", transpose_gating_einsum: bool = True, layer_offset: int = 0) -> NameMap:
    """google-deepmind's ``gemma``: ``gm.nn.Gemma3_*`` and ``Gemma2_*``.

    Args:
      prefix: put before every module name; "" for a causal model.
      transpose_gating_einsum: of the model's config: ``gating_einsum`` lies [2, hidden, features]
        (Gemma 3 and Gemma 2 from 9B on: True), or [2, features, hidden] (Gemma 2 2B).
      layer_offset: as in `NameMap`.

    Returns:
      The name map.
    """
    layer = r"layer_(?P<i>\d+)/"
    rules: Rules = {
        **_gemma_attention(layer),
        layer + "mlp/gating_einsum": (
            f"{LAYER}.mlp.{{gate_proj|up_proj}}",
            "soi" if transpose_gating_einsum else "sio",
        ),
        layer + "mlp/linear": (f"{LAYER}.mlp.down_proj", "io"),
        "embedder/input_embedding": ("model.embed_tokens", "io"),
        **_vectors(layer, "scale", NORMS),
        "final_norm/scale": ("model.norm[weight]", "o"),
    }
    return NameMap(rules, prefix, layer_offset)


def tunix(prefix: str = "", layer_offset: int = 0) -> NameMap:
    """Tunix: its ``llama3``, ``qwen2``, ``qwen3`` (dense) and ``gemma3`` models.

    Args:
      prefix: put before every module name; "" for a causal model.
      layer_offset: as in `NameMap`.

    Returns:
      The name map.
    """
    layer = r"layers/(?P<i>\d+)/"
    norms = {name: name for name in ("input_layernorm", "post_attention_layernorm")}
    heads = {f"attn/{name}": f"self_attn.{name}" for name in ("q_norm", "k_norm")}
    rules: Rules = {
        layer + r"attn/([qkv])_proj/w": (LAYER + r".self_attn.\2_proj", "ioo"),
        layer + "attn/o_proj/w": (f"{LAYER}.self_attn.o_proj", "iio"),
        layer + r"attn/([qkv])_bias": (LAYER + r".self_attn.\2_proj[bias]", "o"),
        **_gemma_attention(layer),
        layer + r"mlp/(gate|up|down)_proj/kernel": (LAYER + r".mlp.\2_proj", "io"),
        "embedder/input_embedding": ("model.embed_tokens", "io"),
        "lm_head/w": ("lm_head", "io"),
        **_vectors(layer, "w", norms | heads),
        **_vectors(layer, "scale", NORMS),
        "final_norm/(?:w|scale)": ("model.norm[weight]", "o"),
    }
    return NameMap(rules, prefix, layer_offset)


def keras_hub(prefix: str = "", post_norms: bool = True, layer_offset: int = 0) -> NameMap:
    """KerasHub: the backbones of Llama, Qwen 2 and 3 (and Mistral) and of Gemma.

    Args:
      prefix: put before every module name; "" for a causal model.
      post_norms: of a Gemma backbone, whether it has norms after attention and feed-forward (Gemma
        2 and 3: True): only then transformers' ``post_attention_layernorm`` is one of these.
      layer_offset: as in `NameMap`.

    Returns:
      The name map.
    """
    llama, gemma = r"transformer_layer_(?P<i>\d+)/", r"decoder_block_(?P<i>\d+)/"
    head = {"query": "q", "key": "k", "value": "v"}
    names = {
        "self_attention_layernorm": "input_layernorm",
        "feedforward_layernorm": "post_attention_layernorm",
    }
    first = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    gemma_names = NORMS if post_norms else first
    gates = {"gate": "gate", "intermediate": "up", "output": "down"}
    rules: Rules = {
        **{
            f"{llama}self_attention/{name}/kernel": (f"{LAYER}.self_attn.{short}_proj", "ioo")
            for name, short in head.items()
        },
        **{  # Qwen 2 has biases, Qwen 3 norms
            f"{llama}self_attention/{name}/bias": (f"{LAYER}.self_attn.{short}_proj[bias]", "oo")
            for name, short in head.items()
        },
        **_vectors(
            llama + "self_attention/",
            "scale",
            {
                "query_dense_layernorm": "self_attn.q_norm",
                "key_dense_layernorm": "self_attn.k_norm",
            },
        ),
        llama + "self_attention/attention_output/kernel": (f"{LAYER}.self_attn.o_proj", "iio"),
        **{
            f"{llama}feedforward_{name}_dense/kernel": (f"{LAYER}.mlp.{short}_proj", "io")
            for name, short in gates.items()
        },
        **_vectors(llama, "scale", names),
        "token_embedding/embeddings": ("model.embed_tokens", "io"),
        "token_embedding/reverse_embeddings": ("lm_head", "io"),
        "sequence_output_layernorm/scale": ("model.norm[weight]", "o"),
        **{
            f"{gemma}attention/{name}/kernel": (f"{LAYER}.self_attn.{short}_proj", "oio")
            for name, short in head.items()
        },
        gemma + "attention/attention_output/kernel": (f"{LAYER}.self_attn.o_proj", "iio"),
        gemma + "ffw_gating/kernel": (f"{LAYER}.mlp.gate_proj", "io"),
        gemma + "ffw_gating_2/kernel": (f"{LAYER}.mlp.up_proj", "io"),
        gemma + "ffw_linear/kernel": (f"{LAYER}.mlp.down_proj", "io"),
        **_vectors(gemma, "scale", gemma_names),
        "final_normalization/scale": ("model.norm[weight]", "o"),
    }
    return NameMap(rules, prefix, layer_offset)


def easydel(prefix: str = "", layer_offset: int = 0) -> NameMap:
    """EasyDeL, whose modules are called as those of transformers.

    Args:
      prefix: put before every module name; "" for a causal model.
      layer_offset: as in `NameMap`.

    Returns:
      The name map.
    """
    layer = r"model/layers/(?P<i>\d+)/"
    rules: Rules = {
        layer + r"(self_attn|mlp)/(\w+_proj)/kernel": (LAYER + r".\2.\3", "io"),
        layer + r"(self_attn|mlp)/(\w+_proj)/bias": (LAYER + r".\2.\3[bias]", "o"),
        layer + r"self_attn/(q_norm|k_norm)/kernel": (LAYER + r".self_attn.\2[weight]", "o"),
        layer + r"(\w+_layernorm)/kernel": (LAYER + r".\2[weight]", "o"),
        "model/embed_tokens/embedding": ("model.embed_tokens", "io"),
        "model/norm/kernel": ("model.norm[weight]", "o"),
        "lm_head/kernel": ("lm_head", "io"),
    }
    return NameMap(rules, prefix, layer_offset)


MAXTEXT = {  # per layer; "{s}" is where scanned layers lie (`param_scan_axis` 1)
    "self_attention/(?P<part>[qkv])(?:uery|ey|alue)/kernel": (
        r"self_attn.\g<part>_proj",
        "i{s}oo",
    ),
    "self_attention/out/kernel": ("self_attn.o_proj", "i{s}io"),
    "mlp/wi_0/kernel": ("mlp.gate_proj", "i{s}o"),
    "mlp/wi_1/kernel": ("mlp.up_proj", "i{s}o"),
    "mlp/wo/kernel": ("mlp.down_proj", "i{s}o"),
}
MAXTEXT_NORMS = {
    "self_attention/query_norm": "self_attn.q_norm",
    "self_attention/key_norm": "self_attn.k_norm",
    "pre_self_attention_layer_norm": "input_layernorm",
    "post_self_attention_layer_norm": "post_attention_layernorm",
}


def maxtext(
    model: str = "qwen3", scan_layers: bool = True, prefix: str = "", layer_offset: int = 0
) -> NameMap:
    """MaxText: its dense Qwen 3, whose weights are transformers' in another layout.

    Of most other models they are not: MaxText puts 1/sqrt(head size) into the query's kernel where
    the queries have no norm (Llama, Mistral, Mixtral, Gemma 2), and Llama 3.1 pairs neighbouring
    features of a head in its rotary positions. A name map moves and renames, so these are errors.

    Args:
      model: ``decoder_block`` of MaxText's config.
      scan_layers: of MaxText's config (its default).
      prefix: put before every module name; "" for a causal model.
      layer_offset: as in `NameMap`.

    Returns:
      The name map.

    Raises:
      ValueError: a model that names alone do not convert.
    """
    if model != "qwen3":
        raise ValueError(
            f"maxtext: got model {model!r}, expected 'qwen3'; others keep 1/sqrt(head size) in "
            "their queries, which renaming does not undo"
        )
    layer, axis = ("decoder/layers/", "s") if scan_layers else (r"decoder/layers_(?P<i>\d+)/", "")
    rules: Rules = {
        layer + path: (f"{LAYER}.{module}", kinds.replace("{s}", axis))
        for path, (module, kinds) in MAXTEXT.items()
    }
    for path, module in MAXTEXT_NORMS.items():
        rules[f"{layer}{path}/scale"] = (f"{LAYER}.{module}[weight]", "o" + axis)
    rules |= {
        "token_embedder/embedding": ("model.embed_tokens", "io"),
        "decoder/decoder_norm/scale": ("model.norm[weight]", "o"),
        "decoder/logits_dense/kernel": ("lm_head", "io"),
    }
    return NameMap(rules, prefix, layer_offset)
