"""Adapters that move to another base model."""

from jlora.transfer.trans_lora import Model as Model
from jlora.transfer.trans_lora import Texts as Texts
from jlora.transfer.trans_lora import Transferred as Transferred
from jlora.transfer.trans_lora import trans_lora as trans_lora
