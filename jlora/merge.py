"""`python -m jlora.merge --config merge.yaml`: merges adapters in files. See `jlora.cli.merge`.

`jl.merge` is the function that merges an adapter into parameters. Python runs a module without
importing it under its name, so both can be called `merge`; should anyone `import jlora.merge`, the
name gives the function.

Source: our reading.
Deviates: nothing.
"""

import sys

if __name__ == "__main__":
    from jlora.cli.merge.main import main

    raise SystemExit(main())

from jlora.core.merge import merge

sys.modules[__name__] = merge  # type: ignore[assignment]
