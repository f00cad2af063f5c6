"""The architecture of a BERT-family encoder as data.

``EncoderConfig`` is frozen and hashable: a static argument of jit, a field of a Flax module.
``Params`` is the plain nested dict described in ``jlora.models.encoder``.

Errors: ``ValueError`` for a width that the heads do not divide.

Source: paper, Devlin et al. 2019 (arXiv:1810.04805).
Deviates: no.
"""

from dataclasses import dataclass

Params = dict


@dataclass(frozen=True)
class EncoderConfig:
    """Architecture of a BERT-family encoder; hashable, so it may be a static argument of jit."""

    vocab: int  # rows of the word table
    layers: int
    width: int  # d
    heads: int
    ffn: int  # inner width of the feed-forward block
    max_positions: int
    segments: int = 2  # rows of the token type table
    norm_eps: float = 1e-12
    init_std: float = 0.02  # of fresh kernels and tables
    pad: int = 0  # id of the padding token
    dtype: str = "float32"  # of activations and matmuls; the parameters keep their own
    head_width: int = 0  # of a head; 0: width / heads. It has to be said where heads were pruned

    def __post_init__(self):
        if not self.head_width and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    @property
    def inner(self) -> int:
        """Width of all heads together: outputs of query, key and value, inputs of out."""
        return self.heads * (self.head_width or self.width // self.heads)
