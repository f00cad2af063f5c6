r"""What the claims of federated systems share: six clients that hold texts of eight corpora.

The training rows of each task and class are spread over the clients by a draw from a Dirichlet
distribution of concentration 0.3, so that corpora and labels are skewed. All systems have the same
rows, batches, steps and learning rate (`federated_rounds`). After five rounds of twenty steps the
global model is judged on the test rows of all eight tasks.

The control is the global model with its change of every kernel turned: the same singular values in
random directions, :math:`W + Q_u \,\mathrm{diag}(\sigma)\, Q_v`. It holds nothing of the texts, so
it has to be worse.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims import federated_rounds as rounds
from experiments.claims import text_merges
from experiments.claims.protocol import Claim, Figures
from experiments.merging import cells, text
from experiments.stages import world as world_lib
from jlora.federated import fedavg
from jlora.models import encoder

SKEW, TEST_ROWS = 0.3, 64
MIXED = (8, 8, 4, 4, 2, 2)  # ranks of the clients where they differ
FEDIT = rounds.Program("FedIT", fedavg.SYSTEM.aggregate)
PADDED = rounds.Program("FedIT, zero-padded", fedavg.SYSTEM.aggregate, ranks=MIXED)
ALONE = rounds.Program("clients on their own", None)


def claim(
    name: str, system: str, program: rounds.Program, baseline: rounds.Program, reference: str,
    *, margin: float = 0.0,
) -> Claim:  # fmt: skip
    """The claim that one federated system is better than another at equal rounds.

    Args:
      name: of the claim file.
      system: the name in the registry.
      program: of the system.
      baseline: what it is compared with.
      reference: where the paper says so.
      margin: by how much accuracy must be better; negative: at most so much worse.
    """
    more = f" - {-100 * margin:g} points" if margin < 0 else ""
    return Claim(
        name=name,
        systems=(system,),
        statement=f"accuracy after {rounds.ROUNDS} rounds of {rounds.CLIENTS} clients with skewed "
        f"texts: {program.name} > {baseline.name}{more}",
        reference=reference,
        baseline=baseline.name,
        control="the change of every kernel with its singular values in random directions",
        unit="accuracy",
        assets=text_merges.ASSETS,
        run=functools.partial(figures, program, baseline),
        margin=margin,
    )


def figures(program: rounds.Program, baseline: rounds.Program, seed: int, workdir: Path) -> Figures:
    """Test accuracy per task of the system, its baseline and its control, one seed."""
    ours, other = simulated(program, seed, workdir), simulated(baseline, seed, workdir)
    base = texts(workdir, seed).base
    lost = turned(base, ours.models[0], seed)
    more = {"bytes up system": ours.sent, "bytes up baseline": other.sent}
    more |= {"loss system": ours.loss, "loss baseline": other.loss}
    more |= {"base model": float(np.mean(judged(workdir, (base,))))}
    values = (judged(workdir, m) for m in (ours.models, other.models, (lost,)))
    return Figures(test(workdir)[0], *values, more=more)


@functools.cache
def simulated(program: rounds.Program, seed: int, workdir: Path) -> rounds.Trained:
    """All rounds of a system, once per seed."""
    return rounds.train(program, texts(workdir, seed), seed)


@functools.cache
def world(workdir: Path) -> tuple[world_lib.World, Any, jax.Array]:
    """The tasks of the merging claims, the last layer, and the states that enter it."""
    found = world_lib.build(text.REAL, workdir, None)
    below, last = encoder.split(found.upper | {"embeddings": {}}, 1)
    layer = jax.jit(lambda x, m: encoder.run(below, x, m, found.model))
    step = 256
    hidden = [layer(found.hidden[i : i + step], found.mask[i : i + step])
              for i in range(0, len(found.hidden), step)]  # fmt: skip
    return found, last, jnp.concatenate(hidden)


@functools.cache
def texts(workdir: Path, seed: int) -> rounds.Texts:
    """The clients of one seed."""
    found, base, hidden = world(workdir)
    names = found.names("seen")[: text_merges.SIZE]
    heads = jnp.asarray(np.stack([found.head_of(n) for n in names]))
    rows = [
        np.stack([r.index, r.label, np.full_like(r.label, i)], axis=1)
        for i, r in enumerate(found.rows[n, "train"] for n in names)
    ]
    pool, counts = split(np.concatenate(rows), rounds.CLIENTS, seed)
    apply = cells.text_classifier(found.model, found.config.head_scale)
    return rounds.Texts(
        apply, base, hidden, found.mask, heads, jnp.asarray(pool), jnp.asarray(counts)
    )


def split(rows: np.ndarray, clients: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [n, 3] (text, label, task) spread over clients: [K, most, 3] padded, counts [K].

    The rows of each task and label are cut by shares from a Dirichlet distribution.

    Args:
      rows: of all tasks.
      clients: K.
      seed: of the shares.
    """
    draw = np.random.default_rng([seed, 11])
    own: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for task, label in sorted({(int(t), int(y)) for _, y, t in rows}):
        some = draw.permutation(rows[(rows[:, 2] == task) & (rows[:, 1] == label)])
        share = draw.dirichlet(np.full(clients, SKEW))
        ends = np.round(np.cumsum(share)[:-1] * len(some)).astype(int)
        for k, part in enumerate(np.split(some, ends)):
            own[k].append(part)
    each = [draw.permutation(np.concatenate(parts)) for parts in own]
    counts = np.asarray([len(e) for e in each], np.int32)
    pool = np.stack([np.resize(e, (counts.max(), 3)) for e in each]).astype(np.int32)
    return pool, counts


@functools.cache
def test(workdir: Path) -> tuple[tuple[str, ...], Any, jax.Array, list[int]]:
    """Names of the tasks, and their test rows as one batch: inputs, labels, real rows per task."""
    found, _, hidden = world(workdir)
    names = tuple(found.names("seen")[: text_merges.SIZE])
    rows = [cells.rows(found._replace(hidden=hidden), n, "test", TEST_ROWS) for n in names]
    inputs = tuple(jnp.concatenate(xs) for xs in zip(*(r.inputs for r in rows), strict=True))
    return names, inputs, jnp.concatenate([r.label for r in rows]), [r.real for r in rows]


def judged(workdir: Path, models: tuple[Any, ...]) -> tuple[float, ...]:
    """Test accuracy per task, mean over models."""
    names, inputs, label, real = test(workdir)
    apply = texts(workdir, 0).apply
    each = []
    for base in models:
        parts = np.split(np.asarray(_right(apply, base, inputs, label)), len(names))
        each.append([h[:n].mean() for h, n in zip(parts, real, strict=True)])
    return tuple(np.mean(each, axis=0).tolist())


@functools.partial(jax.jit, static_argnums=0)
def _right(apply: Any, base: Any, inputs: tuple[jax.Array, ...], label: jax.Array) -> jax.Array:
    return apply(base, *inputs).argmax(-1).astype(jnp.int32) == label


def turned(before: Any, after: Any, seed: int) -> Any:
    """`after` with its change of the adapted kernels in random directions."""

    def one(path, old, new):
        name = "/".join(str(k.key) for k in path)
        if name not in rounds.SITES:
            return new
        key = jax.random.fold_in(jax.random.key(seed), rounds.SITES.index(name))
        left, right = jax.random.split(key)
        s = jnp.linalg.svd(new - old, compute_uv=False)
        u = jnp.linalg.qr(jax.random.normal(left, old.shape, jnp.float32))[0]
        v = jnp.linalg.qr(jax.random.normal(right, old.mT.shape, jnp.float32))[0]
        return old + jnp.matmul(u * s[..., None, :], v.mT)

    return jax.tree_util.tree_map_with_path(one, before, after)
