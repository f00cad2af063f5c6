"""The laws that every method obeys; `check(MyMethod(rank=2))` raises where one is broken.

A further trial of a law is ``LAWS["L4"](Case(method))``.
"""

from jlora.contract.case import FAST_COMPILE as FAST_COMPILE
from jlora.contract.case import Case as Case
from jlora.contract.case import close as close
from jlora.contract.laws import LAWS as LAWS
from jlora.contract.laws import check as check
from jlora.contract.laws import peft_round_trip as peft_round_trip
