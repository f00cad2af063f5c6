"""Strict settings for every test: 8 host devices, no implicit dtype or rank promotion."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


MAPPED = 15_000  # every compiled program maps some memory; a process may have 65,530 maps


@pytest.fixture(scope="module", autouse=True)
def forget_compiled():
    """What one file compiled is given back: thousands of programs fill the memory otherwise."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def forget_many_compiled():
    """The same within a file: at the limit of maps, the next compilation ends the process."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPED:
        jax.clear_caches()
