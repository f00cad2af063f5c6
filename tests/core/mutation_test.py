"""The laws can fail: each part broken on purpose, and the law seen to notice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora as jl
from jlora.core import compat, matmul, rules
from jlora.core.lazy import Lazy

LORA = jl.LoRA(2, 4.0)


def w(*shape):
    return np.random.default_rng(1).normal(size=shape) / 2


X = np.random.default_rng(0).normal(size=(3, 5, 6))


def scan(p, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]


def heads(p, x):
    return x @ p["w"].transpose(2, 1, 0).reshape(6, 8)


def wrong_order(monkeypatch):
    monkeypatch.setattr(matmul, "inverse_permutation", lambda order: list(range(len(order))))


def wrong_slice(monkeypatch):
    unstack = Lazy.unstack

    def mixed(self, axis):
        (base, own), rebuild = unstack(self, axis)
        return (base, jax.tree.map(lambda t: jnp.flip(t, 0), own)), rebuild

    monkeypatch.setattr(Lazy, "unstack", mixed)


def no_scale(monkeypatch):
    monkeypatch.setattr(jl.LoRA, "apply", lambda self, x, w, p, c: x @ w + x @ p["a"] @ p["b"])


def merged_instead(monkeypatch):
    monkeypatch.setattr(jl.LoRA, "apply", lambda self, x, w, p, c: x @ w.merged(self, p))


def not_identity(monkeypatch):
    init = jl.LoRA.init

    def one(self, key, site, context):
        trainable, frozen = init(self, key, site, context)
        return {**trainable, "b": trainable["b"] + 1}, frozen

    monkeypatch.setattr(jl.LoRA, "init", one)


def stopped(monkeypatch):
    apply = jl.LoRA.apply
    stop = lambda p: jax.tree.map(lax.stop_gradient, p)  # noqa: E731
    monkeypatch.setattr(jl.LoRA, "apply", lambda self, x, w, p, c: apply(self, x, w, stop(p), c))


def forgotten(monkeypatch):
    call = rules.RULES["jit"]

    def bare(scope, eqn, *values):
        if scope.uses is not None:
            return call(scope, eqn, *values)
        return compat.bind(eqn, [v.view() if isinstance(v, Lazy) else v for v in values])

    monkeypatch.setitem(rules.RULES, "jit", bare)


CASES = {
    "axes joined in the wrong order": (wrong_order, heads, w(4, 2, 6)),
    "slices of another layer": (wrong_slice, scan, w(3, 6, 6)),
    "scale left out": (no_scale, scan, w(3, 6, 6)),
    "merged in the loss": (merged_instead, scan, w(3, 6, 6)),
    "a fresh adapter is not the identity": (not_identity, scan, w(3, 6, 6)),
    "gradient stopped": (stopped, scan, w(3, 6, 6)),
    "an adapter lost in an inner jit": (
        forgotten,
        lambda p, x: jax.jit(jnp.matmul)(x, p["w"]),
        w(6, 7),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_broken_part_is_noticed(law, monkeypatch, name):
    mutate, fn, weight = CASES[name]
    law(fn, {"w": weight}, {"w": LORA}, X, fresh=True)
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        law(fn, {"w": weight}, {"w": LORA}, X, fresh=True)
