"""Strict settings for every test: 8 host devices, no implicit dtype or rank promotion.

Most of the time goes into compiling thousands of tiny programs that run once, so XLA spends no
effort on them: a third of the time. So it is in processes that a test starts with `quick`
(experiments, benchmarks), which may share what they compile. Other processes (the notebook
with the pinned model, two processes of JAX, `tests/core/thin_products_test.py`) are optimised as
they are for users.

Python looks for cycles of dead objects after 50,000 new ones, not 700, and not among what
was imported and collected: tracing makes many objects, and a seventh of the time went into looking.
"""

import gc
import itertools
import os
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # A release that does not know these ends the process. The second: a program is one module
        # of LLVM, not up to 32; that is a sixth of the time of larger ones.
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        * version("jaxlib").startswith(("0.8.", "0.10.")),
    ]
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

gc.set_threshold(50_000, 10, 10)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)

FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
MAPPED = 15_000  # every compiled program maps some memory; a process may have 65,530 maps
TESTS = itertools.count()  # of this process

LONGEST = ("cond_pdiff_test", "laws_test", "benchmarks_test", "text_test")


def pytest_collection_modifyitems(items):
    """The longest files first, or one worker ends with one of them while the others are idle."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else 9)


def pytest_collection_finish():
    """What is there now stays until the end: it is not searched for dead objects again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def forget_compiled():
    """What one file compiled is given back: thousands of programs fill the memory otherwise.

    A command that a test ran in this process may have named a folder for compiled programs; the
    next file must not write there. Objects that end in a cycle do so in the file that made them.
    """
    yield
    jax.clear_caches()
    gc.collect()
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def forget_many_compiled():
    """The same within a file: at the limit of maps, the next compilation ends the process.

    Counting maps takes up to 10 ms: it is done after every eighth test.
    """
    yield
    maps = Path("/proc/self/maps")
    if next(TESTS) % 8 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MAPPED:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def quick(tmp_path_factory) -> dict[str, str]:
    """The environment of a process that a test starts: one device, no effort on optimising.

    What one of them compiled, those after it read: every program is kept, also a small one.
    """
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": FLAGS if FLAGS in os.environ["XLA_FLAGS"] else "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.fixture(scope="session")
def make():
    """make(seed, n, d_in, r, d_out): n random low-rank deltas of one site; n=0: one of them."""

    from jlora import algebra

    def one(seed=0, n=3, d_in=8, r=2, d_out=6):
        rng, lead = np.random.default_rng(seed), (n,) if n else ()
        u, v = rng.normal(size=(*lead, d_in, r)), rng.normal(size=(*lead, r, d_out))
        return algebra.LowRank(jnp.asarray(u, jnp.float32), jnp.asarray(v, jnp.float32))

    return one


@pytest.fixture(scope="session")
def dense():
    """The matrix of a delta, float64."""

    def one(low):
        return np.asarray(low.u, np.float64) @ np.asarray(low.v, np.float64)

    return one
