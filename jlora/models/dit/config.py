"""The architecture of a pixel DiT as data.

One config covers the variants that experiments compare: full adaLN or AdaLN-LoRA, with or without
normalised queries and keys. ``DiTConfig`` is frozen and hashable: a static argument of jit. The
size of a picture is not part of it: positions are computed, so any size that the patches divide
runs.

Reference: Peebles and Xie 2023 (arXiv:2212.09748); Wang et al. 2024 (arXiv:2410.13925).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Architecture of a DiT on pixels.

    Attributes:
      styles: classes of the condition, numbered from 1; class 0 is "none".
      words: rows of the table of words; row 0 is padding and is never seen.
      patch: P, pixels of a patch, each way; 4 makes 64 tokens of a picture of 32 x 32.
      channels: of a pixel; 3 for RGB.
      width: d, of the tokens; a multiple of 4 (positions) and of `heads`.
      depth: L, blocks.
      heads: H, of both attentions.
      ffn: inner width of the feed-forward block; DiT's is 4 d.
      rank: r of AdaLN-LoRA; 0 is DiT's own adaLN, a matrix of d x 6 d per block.
      qk_norm: queries and keys of self-attention are normalised per head.
    """

    styles: int
    words: int
    patch: int = 4
    channels: int = 3
    width: int = 160
    depth: int = 6
    heads: int = 5
    ffn: int = 480
    rank: int = 32
    qk_norm: bool = True

    def __post_init__(self):
        for name in ("styles", "words", "patch", "channels", "width", "depth", "heads", "ffn"):
            if getattr(self, name) < 1:
                raise ValueError(f"DiTConfig: {name}: got {getattr(self, name)}, expected >= 1")
        if self.width % 4 or self.width % self.heads:
            raise ValueError(
                f"DiTConfig: width: got {self.width}, expected a multiple of 4 and of heads"
                f" {self.heads}"
            )
        if not 0 <= self.rank <= self.width:
            raise ValueError(
                f"DiTConfig: rank: got {self.rank}, expected 0 (adaLN) to width {self.width}"
            )
