"""Merging: adapters to one adapter, on whole banks, without a dense delta."""

from jlora.merging.inputs import Gathered as Gathered
from jlora.merging.inputs import gather as gather
from jlora.merging.inputs import per_site as per_site
from jlora.merging.inputs import to_adapter as to_adapter
from jlora.merging.run import apply as apply
from jlora.merging.run import bound as bound
from jlora.merging.run import certificate as certificate
from jlora.merging.run import lookup as lookup
from jlora.merging.run import merge as merge
from jlora.merging.table import METHODS as METHODS
from jlora.merging.table import Merging as Merging
