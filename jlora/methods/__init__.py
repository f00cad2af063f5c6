"""Parameterisations: one file per method, each a frozen dataclass of pure functions of a matrix."""

from jlora.methods.blocks.bat import BAT as BAT
from jlora.methods.blocks.c3a import C3A as C3A
from jlora.methods.blocks.gralora import GraLoRA as GraLoRA
from jlora.methods.blocks.miss import MiSS as MiSS
from jlora.methods.decomposed.decomposed import Decomposed as Decomposed
from jlora.methods.decomposed.delora import DeLoRA as DeLoRA
from jlora.methods.decomposed.dora import DoRA as DoRA
from jlora.methods.kronecker.lokr import LoKr as LoKr
from jlora.methods.low_rank.adalora import AdaLoRA as AdaLoRA
from jlora.methods.low_rank.hira import HiRA as HiRA
from jlora.methods.low_rank.locon import LoCon as LoCon
from jlora.methods.low_rank.loha import LoHa as LoHa
from jlora.methods.low_rank.lora import LoRA as LoRA
from jlora.methods.low_rank.pissa import PiSSA as PiSSA
from jlora.methods.orthogonal.boft import BOFT as BOFT
from jlora.methods.orthogonal.hra import HRA as HRA
from jlora.methods.orthogonal.oft import OFT as OFT
from jlora.methods.orthogonal.road import RoAd as RoAd
from jlora.methods.routed.experts import Experts as Experts
from jlora.methods.selective.bitfit import BitFit as BitFit
from jlora.methods.selective.ia3 import IA3 as IA3
from jlora.methods.selective.ln_tuning import LNTuning as LNTuning
from jlora.methods.selective.trainable_tokens import TrainableTokens as TrainableTokens
from jlora.methods.shared_basis.vera import VeRA as VeRA
from jlora.methods.wrappers.token_mask import TokenMask as TokenMask
