"""Linear algebra on factored deltas: sums, inner products, spectra, truncation. Never forms dW.

`deltas(adapter)` reads an adapter as `{path: delta}`, stack axes leading; every function takes such
a dictionary (or the adapter itself), is pure, and can be jitted, vmapped and differentiated
(spectra: away from repeated singular values). A missing site is a zero delta. Results are float32
(float64 where the factors are). Matmuls run at the highest precision.
"""

from jlora.algebra.spectra import FRESH as FRESH
from jlora.algebra.spectra import SVD as SVD
from jlora.algebra.spectra import Truncated as Truncated
from jlora.algebra.spectra import balanced as balanced
from jlora.algebra.spectra import distance as distance
from jlora.algebra.spectra import principal_angles as principal_angles
from jlora.algebra.spectra import singular_values as singular_values
from jlora.algebra.spectra import svd as svd
from jlora.algebra.spectra import truncate as truncate
from jlora.algebra.sums import Delta as Delta
from jlora.algebra.sums import Deltas as Deltas
from jlora.algebra.sums import Kron as Kron
from jlora.algebra.sums import LowRank as LowRank
from jlora.algebra.sums import add as add
from jlora.algebra.sums import combine as combine
from jlora.algebra.sums import cosine as cosine
from jlora.algebra.sums import deltas as deltas
from jlora.algebra.sums import gram as gram
from jlora.algebra.sums import inner as inner
from jlora.algebra.sums import kron as kron
from jlora.algebra.sums import low_rank as low_rank
from jlora.algebra.sums import norm as norm
from jlora.algebra.sums import scale as scale
from jlora.algebra.sums import similarity as similarity
from jlora.algebra.sums import widened as widened
