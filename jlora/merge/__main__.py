"""`python -m jlora.merge --config merge.yaml`: the same as `jlora merge --config merge.yaml`."""

from jlora.cli.merge.main import main

if __name__ == "__main__":
    raise SystemExit(main())
