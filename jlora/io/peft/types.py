"""PEFT's types that jlora does not read, and what each of them does.

==========================================  ===================================================
what it changes                             types
==========================================  ===================================================
a weight, by more than its file holds       ADAMSS PSOFT
the output, depending on tokens or tasks    LILY POLY XLORA
tokens or caches, no weight                 ADAPTION_PROMPT CARTRIDGE CPT MULTITASK_PROMPT_TUNING
                                            PREFIX_TUNING PROMPT_TUNING P_TUNING
a model alongside the model                 SHADOW
==========================================  ===================================================

Source: peft 0.21.2, read for its behaviour.
Deviates: nothing.
"""

from __future__ import annotations

UNSAVED = (
    "it depends on the signs of singular vectors or on the labels of clusters that another run, or "
    "release, of PEFT's libraries may choose in another way, and its file does not hold them"
)
DYNAMIC = "what it adds depends on tokens or tasks, so it is no change of a weight"
PROMPTS = "it adds tokens or a cache and changes no weight"
ALONGSIDE = "it is a model alongside the model"

_GROUPS = {
    UNSAVED: "ADAMSS PSOFT",
    DYNAMIC: "LILY POLY XLORA",
    PROMPTS: "ADAPTION_PROMPT CARTRIDGE CPT MULTITASK_PROMPT_TUNING PREFIX_TUNING PROMPT_TUNING "
    "P_TUNING",
    ALONGSIDE: "SHADOW",
}
OTHERS: dict[str, str] = {
    name: reason for reason, names in _GROUPS.items() for name in names.split()
}
