"""Parameterisations: one file a method, each a frozen dataclass of pure functions of one matrix."""

from jlora.methods.adalora import AdaLoRA as AdaLoRA
from jlora.methods.boft import BOFT as BOFT
from jlora.methods.decomposed import Decomposed as Decomposed
from jlora.methods.dora import DoRA as DoRA
from jlora.methods.experts import Experts as Experts
from jlora.methods.hira import HiRA as HiRA
from jlora.methods.ia3 import IA3 as IA3
from jlora.methods.locon import LoCon as LoCon
from jlora.methods.loha import LoHa as LoHa
from jlora.methods.lokr import LoKr as LoKr
from jlora.methods.lora import LoRA as LoRA
from jlora.methods.oft import OFT as OFT
from jlora.methods.pissa import PiSSA as PiSSA
from jlora.methods.token_mask import TokenMask as TokenMask
from jlora.methods.trainable_tokens import TrainableTokens as TrainableTokens
from jlora.methods.vera import VeRA as VeRA
