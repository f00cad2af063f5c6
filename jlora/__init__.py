"""jlora: low-rank adapters in JAX.

An adapter is a PyTree alongside the parameters. Merging it into them is its meaning; `lift` runs it
without ever merging. A tour, with ``import jlora as jl``:

====================================  =============================================================
jl.sites(fn, params, x)               the weights that fn uses, and how; nothing runs
jl.init(key, fn, params, x, methods)  a fresh adapter for those that the patterns select
jl.inits.eva(fn, params, batches, .)  an adapter that starts from data, gradients or the weights
jl.lift(fn)                           tuned(params, adapter, x) == fn(merge(params, adapter), x)
jl.merge(params, adapter)             new parameters; those given are not touched
jl.delta(params, adapter)             what it adds to each weight, dense
jl.stack(adapters), bank[i]           many adapters as one PyTree, for jax.vmap
jl.serving_bank(bank)                 a bank laid out for batches whose rows use different adapters
jl.block(name, fn)                    a part of a model whose experts are mixed on what it returns
jl.per_layer(array), jl.PerSite       side inputs with a value for each layer and site
jl.specs(adapter, base_specs, mesh)   shardings of an adapter from those of its base
jl.quantize(w, bits, block)           a frozen weight in 8 or 4 bits
jl.algebra                            sums, norms, angles and SVDs of factored deltas
jl.merging                            adapters to one adapter, without a dense delta
jl.retrieval                          similar, duplicate and clustered adapters of a bank
jl.transfer                           adapters that move to another base model
jl.io                                 PEFT, kohya and diffusers files, Orbax checkpoints
jl.LoRA, jl.DoRA, ...                 the methods; jl.Method is the contract for your own
====================================  =============================================================

`jlora systems` lists all systems with their papers, tests and claims;
`jlora.contract.check(MyMethod())` tries the laws on a method of your own.
"""

from jlora import algebra as algebra
from jlora import inits as inits
from jlora import io as io
from jlora import merging as merging
from jlora import retrieval as retrieval
from jlora import transfer as transfer
from jlora.core.adapter import Adapter as Adapter
from jlora.core.adapter import stack as stack
from jlora.core.block import BlockMethod as BlockMethod
from jlora.core.block import block as block
from jlora.core.context import PerSite as PerSite
from jlora.core.context import per_layer as per_layer
from jlora.core.evaluate import DenseWeightError as DenseWeightError
from jlora.core.lift import lift as lift
from jlora.core.method import Method as Method
from jlora.core.method import Wrapper as Wrapper
from jlora.core.site import InitContext as InitContext
from jlora.core.site import Site as Site
from jlora.core.sites import init as init
from jlora.core.sites import sites as sites
from jlora.merge import delta as delta
from jlora.merge import merge as merge
from jlora.methods.decomposed.decomposed import Decomposed as Decomposed
from jlora.methods.decomposed.dora import DoRA as DoRA
from jlora.methods.kronecker.lokr import LoKr as LoKr
from jlora.methods.low_rank.adalora import AdaLoRA as AdaLoRA
from jlora.methods.low_rank.hira import HiRA as HiRA
from jlora.methods.low_rank.locon import LoCon as LoCon
from jlora.methods.low_rank.loha import LoHa as LoHa
from jlora.methods.low_rank.lora import LoRA as LoRA
from jlora.methods.low_rank.pissa import PiSSA as PiSSA
from jlora.methods.low_rank.slora import SLoRA as SLoRA
from jlora.methods.orthogonal.boft import BOFT as BOFT
from jlora.methods.orthogonal.oft import OFT as OFT
from jlora.methods.routed.experts import Experts as Experts
from jlora.methods.routed.mixlora import MixLoRA as MixLoRA
from jlora.methods.selective.bitfit import BitFit as BitFit
from jlora.methods.selective.ia3 import IA3 as IA3
from jlora.methods.selective.ln_tuning import LNTuning as LNTuning
from jlora.methods.selective.trainable_tokens import TrainableTokens as TrainableTokens
from jlora.methods.shared_basis.unilora import UniLoRA as UniLoRA
from jlora.methods.shared_basis.vblora import VBLoRA as VBLoRA
from jlora.methods.shared_basis.vera import VeRA as VeRA
from jlora.methods.wrappers.residual import Residual as Residual
from jlora.methods.wrappers.token_mask import TokenMask as TokenMask
from jlora.quantized import Quantized as Quantized
from jlora.quantized import quantize as quantize
from jlora.serving.bank import serving_bank as serving_bank
from jlora.sharding import specs as specs

__all__ = [
    "BOFT",
    "IA3",
    "OFT",
    "AdaLoRA",
    "Adapter",
    "BitFit",
    "BlockMethod",
    "Decomposed",
    "DenseWeightError",
    "DoRA",
    "Experts",
    "HiRA",
    "InitContext",
    "LNTuning",
    "LoCon",
    "LoHa",
    "LoKr",
    "LoRA",
    "Method",
    "MixLoRA",
    "PerSite",
    "PiSSA",
    "Quantized",
    "Residual",
    "SLoRA",
    "Site",
    "TokenMask",
    "TrainableTokens",
    "UniLoRA",
    "VBLoRA",
    "VeRA",
    "Wrapper",
    "algebra",
    "block",
    "delta",
    "init",
    "inits",
    "io",
    "lift",
    "merge",
    "merging",
    "per_layer",
    "quantize",
    "retrieval",
    "serving_bank",
    "sites",
    "specs",
    "stack",
    "transfer",
]
