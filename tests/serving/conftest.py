"""The tiny model of the tests of engine and server."""

from tests.serving.served import foreign, llama, oracle

__all__ = ["foreign", "llama", "oracle"]
