"""`jlora.torch_random`, for readers of files.

Deviates: nothing.
"""

from jlora.torch_random import Generator as Generator
