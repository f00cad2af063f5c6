"""Merging: adapters to one adapter, on whole banks, without a dense delta."""

from jlora.merging.banks import cluster as cluster
from jlora.merging.banks import duplicates as duplicates
from jlora.merging.banks import retrieve as retrieve
from jlora.merging.convert import Converted as Converted
from jlora.merging.convert import to_lora as to_lora
from jlora.merging.diagnostics import overlap as overlap
from jlora.merging.diagnostics import sign_conflict as sign_conflict
from jlora.merging.inputs import Gathered as Gathered
from jlora.merging.inputs import gather as gather
from jlora.merging.inputs import per_site as per_site
from jlora.merging.inputs import to_adapter as to_adapter
from jlora.merging.run import apply as apply
from jlora.merging.run import bound as bound
from jlora.merging.run import certificate as certificate
from jlora.merging.run import lookup as lookup
from jlora.merging.run import merge as merge
from jlora.merging.run import peak_memory as peak_memory
from jlora.merging.table import METHODS as METHODS
from jlora.merging.table import Merging as Merging
