r"""Trans-LoRA's filter: texts that the discriminator keeps teach more than as many by chance.

The same students, texts and steps as the claim `trans_lora`; only which texts are learned from
differs.
"""

import functools
from pathlib import Path

from experiments.claims import text_transfer as lib
from experiments.claims import trans_lora
from experiments.claims import transfer_bases as bases
from experiments.claims.protocol import Claim, Figures
from experiments.claims.text_transfer import Size


def figures(size: Size, seed: int, workdir: Path) -> Figures:
    """Per task: filtered, unfiltered and random texts, one seed."""
    result = trans_lora.measured(bases.L6, bases.L3, size, seed, workdir)
    names = tuple(t.name for t in bases.tasks())
    return Figures(names, result["LoRA"], result["unfiltered"], result["random texts"])


CLAIM = Claim(
    name="trans_lora_filter",
    systems=("Trans-LoRA",),
    statement="accuracy of a moved adapter: texts that the discriminator keeps > as many by chance",
    reference="arXiv:2405.17258 (filtered against unfiltered text)",
    baseline="unfiltered texts",
    control="texts of random words",
    unit="accuracy",
    assets=lib.ASSETS,
    run=functools.partial(figures, Size()),
)
