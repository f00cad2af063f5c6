"""`jlora serve` as replicas behind Ray Serve, on one machine or on many.

    serve run jlora.cli.ray_serve:app base=models/smollm adapters=/shared/adapters replicas=2

Every replica is one `jlora serve` without its socket: it reads the base once, and adapters from the
folder when a request names them. The folder is the store that all replicas share (NFS, a bucket
that is mounted): an adapter that is put there is found by each of them, by the name of its
directory. `/v1/load_lora_adapter`, `/v1/unload_lora_adapter` and `/metrics` speak of the replica
that answers. Requests go to the replica with fewest of them running. `pip install 'jlora[ray]'`.

Deployed by a file, `serve deploy deployment.yaml`:

    applications:
      - name: jlora
        import_path: jlora.cli.ray_serve:app
        args: {base: models/smollm, adapters: /shared/adapters, replicas: 2, memory: 512}

Reference: https://docs.ray.io/en/latest/serve, application builders and ASGI applications.
Deviates: nothing.
"""

from collections.abc import Mapping

from jlora.cli import serve
from jlora.types import Dynamic

OWN = {"replicas": 1, "cpus": 1, "gpus": 0, "running": 64}  # arguments of the deployment itself
UNUSED = ("host", "port")  # of `jlora serve`, which listens itself


def app(args: Mapping[str, Dynamic]) -> Dynamic:
    """The application builder that Ray Serve calls.

    Args:
      args: flags of `jlora serve` by name (base and adapters are required), and replicas, cpus and
        gpus of each, and running: requests that a replica takes at once, those that wait included.

    Returns:
      A Ray Serve application.

    Raises:
      ValueError: an unknown argument, one that is missing, or a number below its least.
    """
    from ray import serve as ray  # pyright: ignore[reportMissingImports]

    own = {name: _number(name, args.get(name, default)) for name, default in OWN.items()}
    words = flags({name: value for name, value in args.items() if name not in OWN})
    serve.parser().parse_args(words)  # what is wrong ends here, not in a replica

    def build() -> Dynamic:
        from jlora.serving import server

        return server.app(serve.service_of(serve.parser().parse_args(words)))

    deployment = ray.deployment(
        name="jlora",
        num_replicas=own["replicas"],
        ray_actor_options={"num_cpus": own["cpus"], "num_gpus": own["gpus"]},
        max_ongoing_requests=own["running"],
    )
    return deployment(ray.ingress(build)()).bind()


def flags(args: Mapping[str, Dynamic]) -> list[str]:
    """Arguments as the words of `jlora serve`.

    Args:
      args: values by name.

    Returns:
      ["--name=value", ...].

    Raises:
      ValueError: a name that is no flag, or that only a process with a socket has.
    """
    known = vars(serve.parser().parse_args(["--base=", "--adapters="])).keys()
    for name in args:
        if name not in known or name in UNUSED:
            expected = sorted((known | OWN.keys()) - set(UNUSED))
            raise ValueError(f"{name}: got an unknown argument, expected one of {expected}")
    for name in ("base", "adapters"):
        if name not in args:
            raise ValueError(f"{name}: missing; expected {name}=PATH")
    return [f"--{name}={value}" for name, value in args.items()]


def _number(name: str, value: Dynamic) -> int:
    least = 0 if name in ("cpus", "gpus") else 1
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = least - 1
    if number < least:
        raise ValueError(f"{name}: got {value!r}, expected an integer of at least {least}")
    return number
