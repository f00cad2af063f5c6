"""`jl.merge` and `jl.delta`: what an adapter makes of the weights, and what it adds to them.

`python -m jlora.merge` merges adapters in files: the same as `jlora merge`, see `jlora.cli.merge`.
"""

from jlora.core.merge import delta as delta
from jlora.core.merge import merge as merge
