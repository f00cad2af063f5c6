"""Compiled programs of the merge command, kept from one run to the next.

A merge compiles a program for each shape; of small adapters that is nearly all of its time. The
library leaves JAX's settings to its users; only the command keeps programs, in the user's cache.

Source: JAX's persistent compilation cache.
Deviates: nothing.
"""

import os
from pathlib import Path

import jax


def keep_compiled() -> None:
    """Keeps compiled programs below `JLORA_CACHE` (default `~/.cache/jlora`), if that is writable.

    A `JAX_COMPILATION_CACHE_DIR` of the user's own is used instead.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    root = os.environ.get("JLORA_CACHE") or os.path.join("~", ".cache", "jlora")
    folder = Path(root).expanduser() / "compiled"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or read-only: it works without
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
