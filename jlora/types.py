"""Four names for what has no type of its own; nothing else in jlora is `Any`.

Arrays of public functions have their shapes from jaxtyping: ``Float[Array, "n d_in"]``.
"""

from typing import Any

Tree = Any  # a PyTree of arrays: parameters, trainable arrays, the state of an optimizer, a carry
Batch = Any  # a PyTree of examples, as a function of the user takes them
Json = Any  # what was read from JSON or YAML and has not been checked yet
Dynamic = Any  # typed elsewhere: results of a user's function, JAX's equations, stand-ins of arrays
