"""Preference objectives: training on pairs of answers, with the base as reference."""

from jlora.preference.dpo import dpo as dpo
from jlora.preference.ipo import ipo as ipo
from jlora.preference.pairs import Pairs as Pairs
from jlora.preference.pairs import against_base as against_base
from jlora.preference.pairs import scorer as scorer
from jlora.preference.simpo import simpo as simpo

__all__ = ["Pairs", "against_base", "dpo", "ipo", "scorer", "simpo"]
