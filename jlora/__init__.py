"""jlora: low-rank adapters in JAX.

An adapter is a PyTree beside the parameters. Merging it into them is its meaning; `lift` runs it
without ever merging.
"""

from jlora import io as io
from jlora import merging as merging
from jlora.core import algebra as algebra
from jlora.core.adapter import Adapter as Adapter
from jlora.core.adapter import Method as Method
from jlora.core.adapter import Site as Site
from jlora.core.adapter import pick as pick
from jlora.core.adapter import stack as stack
from jlora.core.evaluate import DenseWeightError as DenseWeightError
from jlora.core.lift import lift as lift
from jlora.core.merge import delta as delta
from jlora.core.merge import merge as merge
from jlora.core.quantized import Quantized as Quantized
from jlora.core.quantized import quantize as quantize
from jlora.core.sharding import specs as specs
from jlora.core.sites import init as init
from jlora.core.sites import sites as sites
from jlora.methods.adalora import AdaLoRA as AdaLoRA
from jlora.methods.boft import BOFT as BOFT
from jlora.methods.dora import DoRA as DoRA
from jlora.methods.experts import Experts as Experts
from jlora.methods.hira import HiRA as HiRA
from jlora.methods.ia3 import IA3 as IA3
from jlora.methods.loha import LoHa as LoHa
from jlora.methods.lokr import LoKr as LoKr
from jlora.methods.lora import LoRA as LoRA
from jlora.methods.oft import OFT as OFT
from jlora.methods.pissa import PiSSA as PiSSA
from jlora.methods.token_mask import TokenMask as TokenMask
from jlora.methods.vera import VeRA as VeRA
