"""SwiftDiffusion: an adapter that is still loading while a picture is begun costs no style.

K* is profiled on other names and other noise than what is measured. Measured is, per picture,
whether a logistic regression on real pictures sees the style, with the adapter patched after K*
steps, from the start, and never. Kept with the record: the same at other K; the latency of requests
whose adapter is read from disk, its pages dropped from memory, by another thread, against loading
first; and a trained control branch for edges, exact on two devices and one step stale.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.claims import picture_styles as styles
from experiments.claims.protocol import Claim, Figures
from experiments.pictures import base_d
from experiments.pictures import settings as flags
from experiments.pictures import train as base_training
from experiments.pictures.data import bytes_of
from experiments.styles import control, distill
from experiments.workdir import StageError
from jlora.generation.diffusion import guidance
from jlora.models import dit
from jlora.serving import bounded_loading, control_service, halves

STYLES = (("google", "hue", 180.0), ("google", "invert", 1.0), ("google", "ground", 216.0))
MARGIN = -0.05  # of the share of pictures with the style: noise
PROFILE = 1_000  # added to the seed of the noise that K is profiled on


class Sizes(NamedTuple):
    """How much of everything."""

    styled: distill.Recipe = styles.STYLED
    control: distill.Recipe = distill.Recipe("", 0, 0.0, 100, 16, 1e-3)
    steps: int = 25  # of a picture
    each: int = 24  # pictures per style
    profiled: int = 8  # pictures of a profile
    requests: int = 4  # per style, of one picture each
    controlled: int = 12  # pictures with edges


SIZES = Sizes()


@functools.cache
def _step(config: dit.DiTConfig, steps: int) -> Any:
    """A guided step of Euler's method, of a batch: weights are arguments of one program."""
    one = guidance.guided(base_training.bind(config))

    @jax.jit
    def step(params: Any, z: Any, number: Any, condition: dit.Condition) -> Any:
        t = 1.0 - jnp.asarray(number, jnp.float32) / steps
        velocity = jax.vmap(lambda z, c: one(params, z, t, c, styles.GUIDANCE))(z, condition)
        return z - velocity / jnp.float32(steps)

    return step


def condition(one: styles.Asked, rows: slice) -> dit.Condition:
    """Some of the names that are asked for."""
    return dit.Condition(jnp.asarray(one.token[rows]), jnp.asarray(one.words[rows]))


def noise(count: int, seed: int) -> jax.Array:
    """First states."""
    return jax.random.normal(jax.random.key(seed), (count, 32, 32, 3))


def states(
    world: styles.World, weights: Callable[[int], Any], z: Any, given: Any, steps: int
) -> np.ndarray:
    """States of a run with weights that depend on the step, [n, steps + 1, 32, 32, 3]."""
    step, kept = _step(world.base.config, steps), [np.asarray(z)]
    for number in range(steps):
        z = step(weights(number), z, number, given)
        kept.append(np.asarray(z))
    return np.stack(kept, axis=1)


def profile(
    world: styles.World, tuned: Any, one: styles.Asked, sizes: Sizes, seed: int
) -> tuple[int, np.ndarray]:
    """K of a style by the rule, and its cosines; on the names that come after those measured."""
    rows = slice(sizes.each, sizes.each + sizes.profiled)
    given = condition(one, rows)
    z = noise(len(given.style), seed + PROFILE)
    runs = [states(world, lambda _, p=p: p, z, given, sizes.steps)
            for p in (tuned, world.base.params)]  # fmt: skip
    alike = bounded_loading.cosines(*runs)
    return bounded_loading.profiled(alike), alike


def styled_share(
    world: styles.World, tuned: Any, one: styles.Asked, sizes: Sizes, seed: int, patched: int
) -> np.ndarray:
    """Whether each picture has the style when the adapter comes after some steps, float [n]."""
    given = condition(one, slice(0, sizes.each))
    weights = lambda k: world.base.params if k < patched else tuned  # noqa: E731
    last = states(world, weights, noise(len(given.style), seed), given, sizes.steps)[:, -1]
    return styles.judged(one, styles.read(world, bytes_of(last))).astype(float)


def cold(folder: Path) -> None:
    """Drops the pages of a folder's files from memory, so that they are read from disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def latencies(
    world: styles.World, saved: Path, like: jl.Adapter, one: styles.Asked, sizes: Sizes, bound: int
) -> list[dict[str, float]]:
    """Seconds of requests of one picture: loading on the way, and loading first."""
    step, out = _step(world.base.config, sizes.steps), []
    load = functools.partial(jl.io.restore_adapter, saved, like)
    with ThreadPoolExecutor(1) as executor:
        for number in range(sizes.requests + 1):
            given = condition(one, slice(number, number + 1))
            own = lambda p, z, k, given=given: step(p, z, k, given)  # noqa: E731
            row: dict[str, float] = {}
            for name, most in (("sequential", 0), ("bounded", bound)):
                params = jax.block_until_ready(jax.tree.map(jnp.array, world.base.params))
                cold(saved)
                start = time.perf_counter()
                ran = bounded_loading.request(
                    own, params, noise(1, number), sizes.steps, load, most, executor
                )
                row[f"{name}: seconds"] = time.perf_counter() - start
                row[f"{name}: steps without the adapter"] = float(ran.patched)
                row[f"{name}: seconds waited"] = ran.waited
                if ran.patched < sizes.steps:  # the sequential form always is
                    start = time.perf_counter()
                    jax.block_until_ready(bounded_loading.unpatch(ran.params, like))
                    row["unpatch: seconds"] = time.perf_counter() - start
            if number:  # the first one compiles
                out.append(row)
    return out


def with_edges(
    world: styles.World, sizes: Sizes, seed: int, devices: tuple[Any, ...]
) -> dict[str, float]:
    """The trained branch: what exact, stale and no control give, and guidance on two devices."""
    base, pictures = world.base, world.pictures
    plan = flags.Settings(batch=sizes.control.batch, seed=seed)

    def rows(step: int) -> Any:
        return base_training.batch(pictures, base_training.rows(pictures, plan, step))

    own, losses = control.train(base, sizes.control, rows, seed)
    chosen = np.random.default_rng(seed).permutation(pictures.measured)[: sizes.controlled]
    given = base_training.batch(pictures, chosen)[1]
    drawing, z = control.edges(pictures.pixels[chosen]), noise(len(chosen), seed)
    parts = control.parts(base.config, sizes.steps, styles.GUIDANCE)
    silent = control.control.init(jax.random.key(0), base.params, base.config, 1)
    weights = {"exact": own, "stale": own, "no control": silent, "two devices": own}
    out, last, used = {}, {}, {}
    for name, branch in weights.items():
        service = devices[1] if name == "two devices" else devices[0]
        at = control_service.placed(
            (base.params, given), (branch, base.params, given, drawing), devices[0], service
        )
        control_service.run(parts, at, z, 1)  # compiles
        start = time.perf_counter()
        run = functools.partial(control_service.run, parts, at, z, sizes.steps)
        last[name], used[name] = run(stale=name == "stale")
        out[f"control, {name}: seconds"] = time.perf_counter() - start
        drawn = bytes_of(np.asarray(last[name]))
        out[f"control, {name}: agreement of edges"] = float(
            control.agreement(drawn, drawing).mean()
        )
    residuals = np.stack([np.asarray(r) for r in used["exact"]]).astype(np.float64)
    flat = residuals.reshape(len(residuals), -1)
    size = np.linalg.norm(flat, axis=1)
    neighbours = (flat[1:] * flat[:-1]).sum(1) / (size[1:] * size[:-1])
    out["control: least cosine of neighbouring steps"] = float(neighbours.min())
    exact, other = (np.asarray(last[n]) for n in ("exact", "two devices"))
    out["control: largest difference on two devices"] = float(np.abs(exact - other).max())
    out["control: loss, first and last tenth: ratio"] = float(
        losses[-max(1, len(losses) // 10):].mean() / losses[: max(1, len(losses) // 10)].mean()
    )  # fmt: skip
    return out | guided_halves(world, given, z, devices)


def guided_halves(
    world: styles.World, given: dit.Condition, z: Any, devices: tuple[Any, ...]
) -> dict[str, float]:
    """One guided prediction of a batch on one device and on two."""
    one = base_training.bind(world.base.config)

    def batch(params: Any, z: Any, t: Any, given: Any, null: Any) -> Any:
        return jax.vmap(lambda z, c: one(params, z, t, c, null)[0])(z, given)

    forms = {
        "one device": guidance.guided(lambda *a: (batch(*a), None)),
        "two devices": halves.guided(batch, halves.mesh(devices)),
    }
    out, values = {}, {}
    for name, form in forms.items():
        run = jax.jit(form)
        args = (world.base.params, z, jnp.float32(0.5), given, jnp.float32(styles.GUIDANCE))
        values[name] = np.asarray(run(*args))  # compiles
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        out[f"guidance, {name}: seconds"] = time.perf_counter() - start
    gap = np.abs(values["one device"] - values["two devices"]).max()
    return out | {"guidance: largest difference on two devices": float(gap)}


def figures(
    seed: int, world: styles.World, workdir: Path, devices: tuple[Any, ...],
    sizes: Sizes = SIZES,
) -> Figures:  # fmt: skip
    """Which pictures have their style, one seed.

    Args:
      seed: of adapters, branch and noise.
      world: base and pictures.
      workdir: adapters are written there, and read while pictures are drawn.
      devices: two, for the control branch and the halves of the guidance.
      sizes: how much of everything.
    """
    kinds, units, times = ("system", "baseline", "control"), [], []
    values: dict[str, list[float]] = {kind: [] for kind in kinds}
    more, kept, bounds = {}, [], []
    for source, family, value in STYLES:
        one = styles.asked(world, source, family, value, sizes.each + sizes.profiled)
        adapter = styles.styled(world, source, family, value, sizes.styled, seed)
        tuned = jl.merge(world.base.params, adapter)
        bound, alike = profile(world, tuned, one, sizes, seed)
        more |= {f"{one.name}: cosine after step {k}": float(x) for k, x in enumerate(alike)}
        more[f"{one.name}: K of the profile"] = float(bound)
        bounds.append(bound)
        kept.append((one, adapter, tuned))
    best = min(bounds)  # one K for all adapters, as there
    more["K*"] = float(best)
    for one, adapter, tuned in kept:
        each = {
            k: styled_share(world, tuned, one, sizes, seed, k)
            for k in sorted({0, best, sizes.steps, *([sizes.steps // 2] * (seed == 0))})
        }
        more |= {f"{one.name}: style score, K = {k}": float(x.mean()) for k, x in each.items()}
        for kind, k in zip(kinds, (best, 0, sizes.steps), strict=True):
            values[kind] += each[k].tolist()
        units += [f"{one.name}/{number}" for number in range(len(each[0]))]
        saved = workdir / "swift_diffusion" / f"{seed}-{one.name.replace(' ', '-')}"
        saved.parent.mkdir(parents=True, exist_ok=True)
        jl.io.save_adapter(saved, adapter, overwrite=saved.exists())
        times += latencies(world, saved, adapter, one, sizes, best)
    for name in times[0]:
        more[f"requests, {name}: median"] = float(np.median([row[name] for row in times]))
    faster = [row["bounded: seconds"] < row["sequential: seconds"] for row in times]
    more["requests: share that bounded loading makes faster"] = float(np.mean(faster))
    more |= with_edges(world, sizes, seed, devices)
    return Figures(tuple(units), *(tuple(values[kind]) for kind in kinds), more=more)


def two_devices() -> tuple[Any, ...]:
    """Two devices; of the CPU as many are asked for where JAX has not started yet.

    Raises:
      StageError: there is one only.
    """
    try:
        jax.config.update("jax_num_cpu_devices", 2)
    except RuntimeError:  # it has started: what there is counts
        pass
    if len(jax.devices()) < 2:
        raise StageError("devices: got 1, expected 2: XLA_FLAGS=--xla_force_host_platform_"
                         "device_count=2")  # fmt: skip
    return tuple(jax.devices()[:2])


def run(seed: int, workdir: Path) -> Figures:
    """Seed `seed`; nothing is shared by seeds."""
    devices = two_devices()
    world = styles.world(base_d.FOLDER, styles.WEIGHTS)
    return figures(seed, world, workdir, devices)


CLAIM = Claim(
    name="swift_diffusion",
    systems=("SwiftDiffusion",),
    statement="share of pictures that have the style of an adapter: patched after K* steps >= "
    f"patched from the start {MARGIN:+}, K* by the profile (cosine 0.99) on other names and noise; "
    "kept with the record: latency with the adapter read from disk on the way and before, exact "
    "and stale control",
    reference="Li 2024, 2407.02031; USENIX ATC 2025: bounded asynchronous loading leaves quality",
    baseline="the same adapter, patched from the start",
    control="the adapter never arrives (K = T), which is the base alone",
    unit="share of pictures with the style",
    assets=("emoji_google", "emoji_twitter", "mnist", "fashion_mnist"),
    run=run,
    margin=MARGIN,
)
