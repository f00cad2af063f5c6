"""`python -m jlora.systems`: the same as `jlora systems`."""

from jlora.cli.systems import main

if __name__ == "__main__":
    raise SystemExit(main())
