r"""The architecture of a decoder of the Llama family as data.

One config covers Llama 2 and 3, Mistral, Qwen 2 and 3, SmolLM 2, Gemma, Gemma 2 and Gemma 3 (text):
they differ in the switches below, not in code. ``DecoderConfig`` is frozen and hashable: a static
argument of jit, a field of a Flax module.

Reference: Touvron et al. 2023 (arXiv:2307.09288); Grattafiori et al. 2024 (arXiv:2407.21783); Yang
    et al. 2024 and 2025 (arXiv:2407.10671, 2505.09388); Gemma Team 2024 and 2025 (arXiv:2408.00118,
    2503.19786).
"""

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: its base and how it is stretched to longer contexts.

    Attributes:
      theta: base of the wavelengths.
      scaling: "default" (none), "linear" (positions divided by `factor`), "dynamic" (NTK: a larger
        base once the sequence is longer than `original`) or "llama3" (long wavelengths divided by
        `factor`, short ones kept, those between interpolated).
      factor: how many times longer the context becomes; 1 for "default".
      original: tokens of the context before it was stretched ("dynamic", "llama3").
      low: "llama3": wavelengths above ``original / low`` are divided.
      high: "llama3": wavelengths below ``original / high`` are kept.
    """

    theta: float = 10_000.0
    scaling: Literal["default", "linear", "dynamic", "llama3"] = "default"
    factor: float = 1.0
    original: int = 0
    low: float = 1.0
    high: float = 4.0

    def __post_init__(self):
        known = ("default", "linear", "dynamic", "llama3")
        if self.scaling not in known:
            raise ValueError(f"rope: scaling: got {self.scaling!r}, expected one of {known}")
        if not self.theta > 0 or not self.factor >= 1:
            raise ValueError(
                f"rope: got theta {self.theta} and factor {self.factor}, expected > 0 and >= 1"
            )
        if self.scaling in ("dynamic", "llama3") and self.original < 1:
            raise ValueError(f"rope: original: got {self.original}, expected >= 1")
        if self.scaling == "llama3" and not 0 < self.low < self.high:
            raise ValueError(f"rope: got low {self.low}, high {self.high}, expected 0 < low < high")


@dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a decoder; hashable, so it may be a static argument of jit.

    Attributes:
      model_type: transformers' name of the family, "llama", "qwen3", "gemma3_text", ...
      vocab: rows of the embedding table.
      layers: depth.
      width: of the residual stream, d.
      heads: query heads.
      kv_heads: key and value heads; each serves ``heads / kv_heads`` query heads.
      head_width: of one head; not always ``width / heads``.
      ffn: inner width of the gated feed-forward block.
      max_positions: tokens the model was made for; longer inputs are not refused.
      rope: rotary embedding of layers with full attention.
      local_rope: that of layers with a sliding window; None: `rope`.
      local: per layer, whether it attends within a sliding window; () when none does.
      window: tokens that a local layer sees, the query's own included; 0 when none is local.
      activation: of the gate.
      qkv_bias: queries, keys and values have a bias.
      out_bias: the output projection of attention has one.
      ffn_bias: gate, up and down have one.
      qk_norm: queries and keys are normalised per head.
      unit_norms: norms multiply by ``1 + scale`` (Gemma).
      post_norms: attention and feed-forward are normalised once more before the sum (Gemma 2, 3).
      scale_embeddings: embeddings are multiplied by ``sqrt(width)`` (Gemma).
      query_scale: s in ``softmax(s q k)``; 0: ``1 / sqrt(head_width)``.
      attention_cap: logits of attention are ``cap tanh(x / cap)``; 0: uncapped.
      logit_cap: the same for the logits of the vocabulary.
      tied: the head is the transposed embedding table.
      norm_eps: under the root of every norm.
      init_std: of fresh kernels and tables.
      dtype: of activations and matmuls; the parameters keep their own.
    """

    model_type: str
    vocab: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    ffn: int
    max_positions: int
    rope: Rope = Rope()
    local_rope: Rope | None = None
    local: tuple[bool, ...] = ()
    window: int = 0
    activation: Activation = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False
    unit_norms: bool = False
    post_norms: bool = False
    scale_embeddings: bool = False
    query_scale: float = 0.0
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    tied: bool = False
    norm_eps: float = 1e-6
    init_std: float = 0.02
    dtype: str = "float32"

    def __post_init__(self):
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"heads: got {self.heads}, expected a multiple of {self.kv_heads}")
        if self.head_width < 2 or self.head_width % 2:
            raise ValueError(f"head_width: got {self.head_width}, expected an even number")
        if self.local and len(self.local) != self.layers:
            raise ValueError(f"local: got {len(self.local)} layers, expected {self.layers}")
        if any(self.local) and self.window < 1:
            raise ValueError(f"window: got {self.window}, expected >= 1 for local layers")
        if self.activation not in ("silu", "gelu_tanh"):
            raise ValueError(f"activation: got {self.activation!r}, expected silu or gelu_tanh")
