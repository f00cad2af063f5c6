"""Everything that writes an adapter for a style from its condition, fitted on seen styles.

===========  =====================================================================================
mean         the mean adapter of all seen styles
nearest      the soup of the seen style whose condition is nearest (cosine)
softmax      soups weighted by softmax of the cosine, temperature by leaving styles out
ridge        kernel ridge from condition to adapter, kernel and penalty by leaving styles out
flow         `jlora.generation.generators.flow`: a flow that corrects a ridge
pdiff        `experiments.styles.pdiff`: the paper's autoencoder and DDPM
===========  =====================================================================================

All but `pdiff` read adapters in the common basis (`basis`), in which a delta is linear in what
differs between adapters; `pdiff` reads the trained factors, as the paper does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.styles import basis, conditions, pdiff, zoo_training
from experiments.styles.pictures import World
from experiments.styles.settings import Settings
from experiments.styles.zoo import Zoo
from jlora.generation.baselines import nearest, ridge, soup
from jlora.generation.generators import flow


class Examples(NamedTuple):
    """What generators are fitted on: adapters of seen styles, several conditions of each."""

    conditions: jax.Array  # [n, 2 F], centred on the seen styles' mean
    tasks: jax.Array  # [n] int32, position of the style among the seen ones
    bank: jl.Adapter  # n adapters in the common basis
    theta: jax.Array  # [m, K] trained factors of the m adapters, each once
    adapter: np.ndarray  # [n] which of the m adapters a row is
    centre: jax.Array  # [2 F]
    kept: dict[str, Any]  # share of the energy in the basis, path -> [layers]


def banked(adapter: jl.Adapter, count: int) -> Any:
    """The frozen arrays of an adapter for a bank of so many."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x))), adapter.frozen)


def examples(world: World, zoo: Zoo, features: conditions.Features) -> Examples:
    """The seen styles' adapters, by run, snapshot and draw of the condition.

    Args:
      world: styles and settings.
      zoo: all trained adapters; those of held-out styles are not read.
      features: features of all styles.
    """
    seen = [style.name for style in world.at("seen")]
    runs = [(k, int(row)) for k, name in enumerate(seen) for row in zoo.of(name)]
    rows = np.asarray([row for _, row in runs])
    trained = jax.tree.map(lambda x: jnp.asarray(x[rows]), zoo.trainable)
    copies = jax.tree.leaves(trained)[0].shape[1]
    trained = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), trained)
    count, draws = len(rows) * copies, world.settings.draws
    bank = zoo.template.replace(trainable=trained, frozen=banked(zoo.template, count))
    target = zoo_training.template(world, world.settings.basis)
    common, kept = basis.fit(bank, target)
    inside = jax.vmap(lambda one: basis.project(common, one))(bank)
    owner = np.repeat(np.asarray([k for k, _ in runs], np.int32), copies)
    given = [
        conditions.condition(world, features, seen[k], f"adapter {m}/{draw}")
        for m, k in enumerate(owner)
        for draw in range(draws)
    ]
    adapter = np.repeat(np.arange(count), draws)
    wide = jax.tree.map(lambda x: x[adapter], inside)
    raw = jnp.asarray(np.stack(given))
    centre = raw.mean(0)
    theta = jax.vmap(lambda t: pdiff.flat(zoo.template.replace(trainable=t)))(trained)
    return Examples(
        raw - centre[None], jnp.asarray(owner[adapter]), wide, theta, adapter, centre, kept
    )


def flow_config(settings: Settings) -> flow.FlowConfig:
    """Hyper-parameters of the flow."""
    return flow.FlowConfig(
        components=settings.components, width=settings.width, depth=settings.depth,
        heads=4, steps=settings.flow_steps, batch=32,
    )  # fmt: skip


def pdiff_config(settings: Settings) -> pdiff.PdiffConfig:
    """Hyper-parameters of Cond P-Diff."""
    return pdiff.PdiffConfig(
        settings.pdiff_ae_steps, settings.pdiff_ae_width, settings.pdiff_steps,
        settings.pdiff_width, settings.pdiff_levels,
    )  # fmt: skip


Generate = Callable[[jax.Array, jax.Array], jl.Adapter]  # (key, centred condition) -> adapter


def _nearest(key: jax.Array, state: soup.Examples, condition: jax.Array) -> jl.Adapter:
    alike = nearest.similarity(condition[None], state.conditions)
    return soup.mixed(nearest.nearest(alike), state.soups)


INTERPOLATING = {
    "mean": (soup.fit, soup.generate),
    "nearest": (soup.fit, _nearest),
    "softmax": (nearest.fit, nearest.generate),
    "ridge": (ridge.learn, ridge.generate),
}
DRAWN = ("flow", "pdiff")  # another key is another adapter
METHODS = (*INTERPOLATING, *DRAWN)


def fitted(name: str, key: jax.Array, given: Examples, settings: Settings) -> Any:
    """The state of a generator.

    Args:
      name: of METHODS.
      key: of what it trains.
      given: seen adapters with conditions.
      settings: its hyper-parameters.
    """
    if name == "flow":
        rows = given.conditions, given.tasks, given.bank
        return flow.fit(key, *rows, flow_config(settings))
    if name == "pdiff":
        theta = given.theta[given.adapter]
        return pdiff.fit(key, given.conditions, theta, pdiff_config(settings))
    return INTERPOLATING[name][0](key, given.conditions, given.tasks, given.bank)


def writer(name: str, state: Any, zoo: Zoo, settings: Settings) -> Generate:
    """A fitted generator as a function of key and condition.

    Args:
      name: of METHODS.
      state: of `fitted`.
      zoo: says of what form an adapter of the paper's is.
      settings: its hyper-parameters.
    """
    if name == "flow":
        return lambda key, c: flow.generate(key, state, c)
    if name == "pdiff":
        own = pdiff_config(settings)
        return lambda key, c: pdiff.unflat(zoo.template, pdiff.generate(key, state, c, own))
    return functools.partial(_written, INTERPOLATING[name][1], state)


def _written(generate: Callable, state: Any, key: jax.Array, condition: jax.Array) -> jl.Adapter:
    return generate(key, state, condition)
