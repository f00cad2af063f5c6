r"""The config of a decoder from and to ``config.json`` of Hugging Face, transformers 4 and 5.

Families: llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text. What a config asks for and the
decoder lacks (YaRN, experts, another activation) is an error that names the field.

Reference: the published checkpoints.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from jlora.io import safetensors_file
from jlora.models.decoder.config import DecoderConfig, Rope
from jlora.types import Dynamic, Json

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
FULL, LOCAL = "full_attention", "sliding_attention"
MAX_CONFIG = 1 << 20  # bytes of config.json


def config_from_hf(directory: str | Path) -> DecoderConfig:
    """Reads ``config.json``, as transformers 4 and 5 write it.

    Args:
      directory: of the checkpoint.

    Returns:
      The architecture.

    Raises:
      ValueError: a field is missing, or asks for what the decoder does not implement.
    """
    path = Path(directory) / "config.json"
    raw = safetensors_file.parse_json(path, safetensors_file.read_bytes(path, MAX_CONFIG))
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: got {type(raw).__name__}, expected an object")
    if raw.get("model_type") not in FAMILIES:
        raise ValueError(
            f"{path}: model_type: got {raw.get('model_type')!r}, expected one of {FAMILIES}"
        )
    return _config(path, raw, raw["model_type"])


def _config(path: Path, raw: Mapping[str, Json], family: str) -> DecoderConfig:
    def need(name: str) -> Json:
        if raw.get(name) is None:
            raise ValueError(f"{path}: {name}: missing")
        return raw[name]

    gemma = family.startswith("gemma")
    sandwich = family in ("gemma2", "gemma3_text")
    width, heads, layers = (
        need(name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    act = raw.get("hidden_activation") or raw.get("hidden_act")
    names = {None: "gelu_tanh" if gemma else "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    act = names.get(act, act)
    if family == "gemma" and act == "gelu":
        act = "gelu_tanh"  # transformers reads the published Gemma configs so
    if raw.get("use_bidirectional_attention"):
        raise ValueError(f"{path}: use_bidirectional_attention: got true, expected false")
    if raw.get("pretraining_tp", 1) != 1:
        raise ValueError(f"{path}: pretraining_tp: got {raw['pretraining_tp']}, expected 1")
    window = raw.get("sliding_window") or 0
    local = _local(path, raw, family, layers, window)
    rope, local_rope = _ropes(path, raw, family)
    attention_bias = bool(raw.get("attention_bias", False))
    scalar = raw.get("query_pre_attn_scalar") if sandwich else None
    return DecoderConfig(
        model_type=family,
        vocab=need("vocab_size"),
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_width=raw.get("head_dim") or width // heads,
        ffn=need("intermediate_size"),
        max_positions=need("max_position_embeddings"),
        rope=rope,
        local_rope=local_rope if any(local) else None,
        local=local if any(local) else (),
        window=window if any(local) else 0,
        activation=cast(Dynamic, act),  # checked there
        qkv_bias=attention_bias or family == "qwen2",
        out_bias=attention_bias,
        ffn_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=family in ("qwen3", "gemma3_text"),
        unit_norms=gemma,
        post_norms=sandwich,
        scale_embeddings=gemma,
        query_scale=float(scalar) ** -0.5 if scalar else 0.0,
        attention_cap=raw.get("attn_logit_softcapping") or 0.0,
        logit_cap=raw.get("final_logit_softcapping") or 0.0,
        tied=bool(raw.get("tie_word_embeddings", gemma)),
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        init_std=raw.get("initializer_range", 0.02),
    )


def _local(
    path: Path, raw: Mapping[str, Json], family: str, layers: int, window: int
) -> tuple[bool, ...]:
    """Which layers attend within the window."""
    if family in ("llama", "gemma") or not window:
        return (False,) * layers
    if family.startswith("qwen") and not raw.get("use_sliding_window", False):
        return (False,) * layers
    if family == "mistral":
        return (True,) * layers
    if (kinds := raw.get("layer_types")) is not None:
        if len(kinds) != layers or not set(kinds) <= {FULL, LOCAL}:
            raise ValueError(
                f"{path}: layer_types: got {kinds}, expected {layers} of {FULL!r} and {LOCAL!r}"
            )
        return tuple(kind == LOCAL for kind in kinds)
    if family.startswith("qwen"):
        return tuple(i >= raw.get("max_window_layers", 28) for i in range(layers))
    period = 2 if family == "gemma2" else raw.get("sliding_window_pattern", 6)
    return tuple(bool((i + 1) % period) for i in range(layers))


def _ropes(path: Path, raw: Mapping[str, Json], family: str) -> tuple[Rope, Rope | None]:
    """The rotary embedding of full and of local layers (None: the same)."""
    given = raw.get("rope_parameters") or {}
    if FULL in given or LOCAL in given:  # transformers 5, per kind of layer
        both = [_rope(path, raw, given.get(k) or {}, None) for k in (FULL, LOCAL)]
        return both[0], both[1]
    theta = given.get("rope_theta", raw.get("rope_theta"))
    full = _rope(path, raw, given or raw.get("rope_scaling") or {}, theta)
    if family == "gemma3_text":
        full = dataclasses.replace(full, theta=float(theta or 1e6))
        return full, Rope(float(raw.get("rope_local_base_freq", 10_000.0)))
    return full, None


def _rope(
    path: Path, raw: Mapping[str, Json], given: Mapping[str, Json], theta: float | None
) -> Rope:
    kind = given.get("rope_type", given.get("type", "default"))
    if (partial := given.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))) != 1:
        raise ValueError(f"{path}: partial_rotary_factor: got {partial}, expected 1")
    theta = float(theta or given.get("rope_theta") or 10_000.0)
    try:
        if kind == "default":
            return Rope(theta)
        original = raw["max_position_embeddings"] if kind == "dynamic" else 0
        low, high = 1.0, 4.0
        if kind == "llama3":
            original = given["original_max_position_embeddings"]
            low, high = given["low_freq_factor"], given["high_freq_factor"]
        return Rope(theta, kind, float(given["factor"]), original, float(low), float(high))
    except KeyError as error:
        raise ValueError(f"{path}: rope_parameters: {error.args[0]}: missing") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def config_to_hf(config: DecoderConfig) -> dict[str, Json]:
    """``config.json`` of a decoder, readable by transformers 4 and 5.

    Args:
      config: the architecture.

    Returns:
      The fields by name, to be written as JSON.
    """
    c = config
    act = "silu" if c.activation == "silu" else "gelu_pytorch_tanh"
    raw: dict[str, Json] = {
        "architectures": [_ARCHITECTURES[c.model_type]],
        "model_type": c.model_type,
        "vocab_size": c.vocab,
        "num_hidden_layers": c.layers,
        "hidden_size": c.width,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_width,
        "intermediate_size": c.ffn,
        "max_position_embeddings": c.max_positions,
        "hidden_act": act,
        "attention_bias": c.out_bias,
        "tie_word_embeddings": c.tied,
        "rms_norm_eps": c.norm_eps,
        "initializer_range": c.init_std,
        "sliding_window": c.window or None,
        "rope_theta": c.rope.theta,
        "rope_parameters": _rope_to_hf(c.rope),
    }
    if c.model_type == "llama":
        raw["mlp_bias"] = c.ffn_bias
    if c.model_type.startswith("qwen"):
        raw["use_sliding_window"] = any(c.local)
    if c.model_type.startswith(("qwen", "gemma2", "gemma3")):
        raw["layer_types"] = [LOCAL if x else FULL for x in c.local or (False,) * c.layers]
    if c.post_norms:
        raw["query_pre_attn_scalar"] = round((c.query_scale or c.head_width**-0.5) ** -2)
        raw["attn_logit_softcapping"] = c.attention_cap or None
        raw["final_logit_softcapping"] = c.logit_cap or None
    if c.unit_norms:
        raw["hidden_activation"] = act
    if c.model_type == "gemma3_text":
        local = c.local_rope or c.rope
        raw["rope_local_base_freq"] = local.theta
        raw["rope_parameters"] = {FULL: _rope_to_hf(c.rope), LOCAL: _rope_to_hf(local)}
    return raw


_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def _rope_to_hf(rope: Rope) -> dict[str, Json]:
    raw: dict[str, Json] = {"rope_type": rope.scaling, "rope_theta": rope.theta}
    if rope.scaling != "default":
        raw["factor"] = rope.factor
    if rope.scaling == "llama3":
        raw |= {
            "original_max_position_embeddings": rope.original,
            "low_freq_factor": rope.low,
            "high_freq_factor": rope.high,
        }
    return raw
