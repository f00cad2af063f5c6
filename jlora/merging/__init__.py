"""Merging: adapters to one adapter, on whole banks, without a dense delta."""

from jlora.merging.convert import Converted as Converted
from jlora.merging.convert import to_lora as to_lora
from jlora.merging.diagnostics import overlap as overlap
from jlora.merging.diagnostics import sign_conflict as sign_conflict
from jlora.merging.engine.dense import Block as Block
from jlora.merging.engine.dense import merged_delta as merged_delta
from jlora.merging.engine.inputs import Gathered as Gathered
from jlora.merging.engine.inputs import gather as gather
from jlora.merging.engine.inputs import per_site as per_site
from jlora.merging.engine.inputs import to_adapter as to_adapter
from jlora.merging.engine.run import apply as apply
from jlora.merging.engine.run import bound as bound
from jlora.merging.engine.run import certificate as certificate
from jlora.merging.engine.run import lookup as lookup
from jlora.merging.engine.run import merge as merge
from jlora.merging.engine.run import peak_memory as peak_memory
from jlora.merging.engine.table import METHODS as METHODS
from jlora.merging.engine.table import Merging as Merging
from jlora.merging.fidelity import Merged as Merged
from jlora.merging.fidelity import certified as certified
