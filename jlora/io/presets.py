"""Name maps of transformers' models: BERT, Llama, ViT, for the layouts that JAX ports of them have.

Those of packages with models of their own (Gemma, Tunix, KerasHub, EasyDeL) are in `stacks`.
"""

from jlora.io.names import NameMap

LAYERS = r"layers(?:[/_](?P<i>\d+))?/"  # a stack, or a list or keys of single layers


def bert(prefix: str = "", layer_offset: int = 0) -> NameMap:
    """BERT, RoBERTa, MiniLM: `jlora.models.encoder` to transformers' `BertModel`.

    Args:
      prefix: ``"bert."`` where the torch model is a `BertFor...`; "" for a bare one.
      layer_offset: first layer of the adapter in the torch model, for adapters of upper layers; 0.

    Returns:
      The name map.
    """
    layer = "encoder.layer.{i}"
    rules = {
        LAYERS + r"attention/(query|key|value)/kernel": layer + r".attention.self.\2",
        LAYERS + r"attention/out/kernel": layer + ".attention.output.dense",
        LAYERS + r"ffn/up/kernel": layer + ".intermediate.dense",
        LAYERS + r"ffn/down/kernel": layer + ".output.dense",
        r"embeddings/(word|position)/embedding": r"embeddings.\1_embeddings",
        r"embeddings/type/embedding": "embeddings.token_type_embeddings",
        r"pooler/kernel": "pooler.dense",
        LAYERS + r"attention/(query|key|value)/bias": layer + r".attention.self.\2[bias]",
        LAYERS + r"attention/out/bias": layer + ".attention.output.dense[bias]",
        LAYERS + r"ffn/up/bias": layer + ".intermediate.dense[bias]",
        LAYERS + r"ffn/down/bias": layer + ".output.dense[bias]",
        LAYERS + r"attention/norm/scale": layer + ".attention.output.LayerNorm[weight]",
        LAYERS + r"attention/norm/bias": layer + ".attention.output.LayerNorm[bias]",
        LAYERS + r"ffn/norm/scale": layer + ".output.LayerNorm[weight]",
        LAYERS + r"ffn/norm/bias": layer + ".output.LayerNorm[bias]",
        r"embeddings/norm/scale": "embeddings.LayerNorm[weight]",
        r"embeddings/norm/bias": "embeddings.LayerNorm[bias]",
        r"pooler/bias": "pooler.dense[bias]",
    }
    return NameMap(rules, prefix, layer_offset)


def llama(prefix: str = "model.", layer_offset: int = 0) -> NameMap:
    """Llama, Mistral, Qwen: scanned or listed layers to transformers' `LlamaForCausalLM`.

    Known site paths: ``layers/attention/{query,key,value,out}/kernel`` and
    ``layers/ffn/{gate,up,down}/kernel`` stacked on layers (or ``layers/3/..``), and the unrolled
    ``[model/]layers/3/self_attn/q_proj/kernel`` (also ``layers_3``) of Flax ports; biases and norms
    (``input_layernorm/scale`` or ``/weight``) of the same.

    Args:
      prefix: ``"model."`` of a causal model; ``""`` where the torch model is a bare `LlamaModel`.
      layer_offset: as in `NameMap`.

    Returns:
      The name map.
    """
    layer, flax = "layers.{i}", r"(?:model/)?" + LAYERS
    rules = {
        LAYERS + r"attention/(q|k|v)(?:uery|ey|alue)/kernel": layer + r".self_attn.\2_proj",
        LAYERS + r"attention/out/kernel": layer + ".self_attn.o_proj",
        LAYERS + r"ffn/(gate|up|down)/kernel": layer + r".mlp.\2_proj",
        flax + r"(self_attn|mlp)/(\w+_proj)/kernel": layer + r".\2.\3",
        r"(?:model/)?embed_tokens/embedding": "embed_tokens",
        LAYERS + r"attention/(q|k|v)(?:uery|ey|alue)/bias": layer + r".self_attn.\2_proj[bias]",
        LAYERS + r"attention/out/bias": layer + ".self_attn.o_proj[bias]",
        flax + r"(self_attn|mlp)/(\w+_proj)/bias": layer + r".\2.\3[bias]",
        flax + r"(input_layernorm|post_attention_layernorm)/(?:scale|weight)": layer
        + r".\2[weight]",
        r"(?:model/)?norm/(?:scale|weight)": "norm[weight]",
    }
    return NameMap(rules, prefix, layer_offset)


def vit(prefix: str = "vit.", layer_offset: int = 0) -> NameMap:
    """ViT: scanned or listed layers to the `ViTForImageClassification` of transformers 5.

    Known site paths: those of `bert`, and the unrolled
    ``[vit/]encoder/layer/3/attention/attention/query/kernel`` of Flax ports.

    Args:
      prefix: ``"vit."`` of a classifier; ``""`` where the torch model is a bare `ViTModel`.
      layer_offset: as in `NameMap`.

    Returns:
      The name map.
    """
    layer = "layers.{i}"
    flax = r"(?:vit/)?encoder/layer/(?P<i>\d+)/"
    rules = {
        LAYERS + r"attention/(q|k|v)(?:uery|ey|alue)/kernel": layer + r".attention.\2_proj",
        LAYERS + r"attention/out/kernel": layer + ".attention.o_proj",
        LAYERS + r"ffn/up/kernel": layer + ".mlp.fc1",
        LAYERS + r"ffn/down/kernel": layer + ".mlp.fc2",
        flax + r"attention/attention/(q|k|v)(?:uery|ey|alue)/kernel": layer + r".attention.\2_proj",
        flax + r"attention/output/dense/kernel": layer + ".attention.o_proj",
        flax + r"intermediate/dense/kernel": layer + ".mlp.fc1",
        flax + r"output/dense/kernel": layer + ".mlp.fc2",
        **_vit_norms(layer),
    }
    return NameMap(rules, prefix, layer_offset)


def _vit_norms(layer: str) -> dict[str, str]:
    return {
        LAYERS + r"attention/norm/scale": layer + ".layernorm_before[weight]",
        LAYERS + r"attention/norm/bias": layer + ".layernorm_before[bias]",
        LAYERS + r"ffn/norm/scale": layer + ".layernorm_after[weight]",
        LAYERS + r"ffn/norm/bias": layer + ".layernorm_after[bias]",
        r"norm/scale": "layernorm[weight]",
        r"norm/bias": "layernorm[bias]",
    }


def vit4(prefix: str = "vit.", layer_offset: int = 0) -> NameMap:
    """As `vit`, with the module names of transformers 4: ``encoder.layer.3.attention...``.

    Args and Returns are those of `vit`.
    """
    layer = "encoder.layer.{i}"
    flax = r"(?:vit/)?encoder/layer/(?P<i>\d+)/"
    rules = {
        LAYERS + r"attention/(query|key|value)/kernel": layer + r".attention.attention.\2",
        LAYERS + r"attention/out/kernel": layer + ".attention.output.dense",
        LAYERS + r"ffn/up/kernel": layer + ".intermediate.dense",
        LAYERS + r"ffn/down/kernel": layer + ".output.dense",
        flax + r"attention/attention/(query|key|value)/kernel": layer + r".attention.attention.\2",
        flax + r"attention/output/dense/kernel": layer + ".attention.output.dense",
        flax + r"(intermediate|output)/dense/kernel": layer + r".\2.dense",
        **_vit_norms(layer),
    }
    return NameMap(rules, prefix, layer_offset)
