"""FFA-LoRA: only b is trained, with differential privacy, against FedIT with the same noise."""

import functools

import numpy as np

from experiments.claims import federated_rounds as rounds
from experiments.claims import federated_text
from experiments.claims.protocol import Figures
from jlora.federated import fedavg, ffa

# Epsilon -> standard deviation of the noise in clips, at delta 1e-3 for the client with the fewest
# rows (280): 25 steps of 32 rows, Poisson-sampled Gaussian mechanism by the RDP accountant of
# dp-accounting 0.6.0.
NOISE = {1: 2.014, 3: 1.061, 6: 0.759}


def private(name, aggregate, train, noise):
    """A system whose clients take five noisy steps of 32 rows in a round."""
    return rounds.Program(name, aggregate, train, steps=5, batch=32, clip=1.0, noise=noise)


OURS = functools.partial(private, "FFA-LoRA, private", ffa.SYSTEM.aggregate, "v")
FEDIT = functools.partial(private, "FedIT, private", fedavg.SYSTEM.aggregate, "uv")


def run(seed, workdir):
    """The figures at every epsilon; a unit is a task and an epsilon."""
    found = {e: federated_text.figures(OURS(n), FEDIT(n), seed, workdir) for e, n in NOISE.items()}
    more = {f"gain at epsilon {e}": float(np.subtract(f.system, f.baseline).mean())
            for e, f in found.items()}  # fmt: skip
    more |= {k: found[1].more[k] for k in ("bytes up system", "bytes up baseline", "base model")}
    return Figures(
        tuple(f"{t}, epsilon {e}" for e, f in found.items() for t in f.units),
        *(sum((getattr(f, n) for f in found.values()), ()) for n in Figures._fields[1:4]),
        more=more,
    )


CLAIM = federated_text.claim(
    name="ffa",
    system="FFA-LoRA",
    program=OURS(NOISE[1]),
    baseline=FEDIT(NOISE[1]),
    reference="Sun 2024, 2403.12313: better than averaging both factors under differential privacy",
)._replace(run=run)
