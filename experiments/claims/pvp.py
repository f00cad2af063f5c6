r"""PVP: adapters that were trained on many drawings start those that get a few.

First stage: LoRA on base C learns to name drawings of a style that C has never seen, of every
second emoji, among the texts of their names. Second stage: the category of the other emoji, from
1, 2, 4 and 8 drawings of each, with a fresh head. Of both stages the base is frozen.

.. math:: \text{gain}(k) = \text{accuracy of the pre-trained start} - \text{of a fresh one},
          \text{ after } k \text{ shots}

The paper has one large set and other, smaller ones; here both are drawings of one style.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims import clip_training as lib
from experiments.claims.protocol import Claim, Figures
from experiments.clip import model, texts
from experiments.pictures import sources
from jlora.inits.pretrained import pretrained

METHOD = jl.LoRA(rank=8, alpha=8.0)
STYLES, CLAIMED, LATER, DRAWS = ("openmoji", "outline"), (1, 2), (4, 8), 4
FIRST_STEPS, FIRST_RATE = 300, 3e-3
STEPS, RATES, TUNING = 30, (1e-3, 3e-3, 1e-2), 1000


@functools.cache
def halves(style):
    """(first stage: names' head and rows; second stage: rows with categories)."""
    pictures = sources.pictures((style,))
    names = tuple(sorted({" ".join(p.words) for p in pictures}))
    labels = tuple(sorted({p.label for p in pictures}))
    even, number = names[::2], {name: n for n, name in enumerate(names)}
    place = np.asarray([number[" ".join(p.words)] for p in pictures], np.int32)
    label = np.asarray([labels.index(p.label) for p in pictures], np.int32)
    pixels, first = np.stack([p.pixels for p in pictures]), place % 2 == 0
    vectors = np.asarray(model.texts(lib.base().params, jnp.asarray(texts.embed(even))))
    head = lib.Head(jnp.asarray(vectors), jnp.zeros(len(even)))
    return (
        head, lib.Rows(pixels[first], place[first] // 2), lib.Rows(pixels[~first], label[~first]),
        len(labels),
    )  # fmt: skip


@functools.cache
def first_stage(style, seed, lost):
    """The adapter of the first stage; with `lost`, of names in random order."""
    c, (head, rows, _, _) = lib.base(), halves(style)
    apply = lib.classifier(c.config)
    rows = lib.shuffled(rows, seed) if lost else rows
    start = lib.fresh(apply, c.params, head, METHOD, seed)
    return lib.fit(apply, c.params, start, head, rows, solver=adam, rate=FIRST_RATE,
                   steps=FIRST_STEPS, seed=seed)  # fmt: skip


def adam(rate):
    """Adam at a constant rate."""
    return optax.adam(rate)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _few_shot(apply, sites, params, trainable, frozen, vectors, pixels, label, rate):
    tuned, rule = jl.lift(apply), optax.adam(rate)
    offset = jnp.zeros(len(vectors))

    def loss(both, x, y):
        adapter = jl.Adapter(both[0], frozen, sites)
        logits = tuned(params, adapter, x, lib.Head(both[1], offset))
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(carry, rows):
        both, state = carry
        x = (rows[0].astype(jnp.float32) - 127.5) / 127.5
        grads = jax.grad(loss)(both, x, rows[1])
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = rule.update(grads, state, both)
        return (optax.apply_updates(both, updates), state), None

    with jax.numpy_dtype_promotion("standard"):
        begin = (trainable, vectors), rule.init((trainable, vectors))
    return jax.lax.scan(step, begin, (pixels, label))[0][0]


def second_stage(style, shots, source, rate, seed):
    """Accuracy on the drawings that are not among the shots.

    Args:
      style: of the drawings.
      shots: of each category.
      source: the adapter of the first stage; None: a fresh one.
      rate: the learning rate.
      seed: of the shots, the fresh start and the batches.
    """
    c, (_, _, rows, classes) = lib.base(), halves(style)
    apply, chosen, rest = lib.classifier(c.config), *lib.few(rows, shots, seed)
    head = lib.Head(jnp.zeros((classes, c.config.joint)), jnp.zeros(classes))
    start = lib.fresh(apply, c.params, head, METHOD, seed)
    start = start if source is None else pretrained(start, source)
    trainable, vectors = _few_shot(
        apply, start.sites, c.params, start.trainable, start.frozen, head.vectors,
        *lib.drawn(chosen, STEPS, seed), jnp.float32(rate),
    )  # fmt: skip
    params = jl.merge(c.params, start.replace(trainable=trainable))
    return lib.accuracy(apply, params, lib.Head(vectors, head.offset), rest)


@functools.cache
def best(warm):
    """The learning rate of the best mean accuracy at the most claimed shots, of other draws."""
    score = {}
    for rate in RATES:
        hits = [second_stage(s, CLAIMED[-1], first_stage(s, TUNING, False) if warm else None, rate,
                             TUNING) for s in STYLES]  # fmt: skip
        score[rate] = np.mean(hits)
    return max(score, key=score.__getitem__)


def run(seed, workdir):
    """Mean accuracy over draws of shots, per style and number of shots, one seed."""
    del workdir
    units, sides, more = [], {"system": [], "baseline": [], "control": []}, {}
    for style in STYLES:
        good, lost = first_stage(style, seed, False), first_stage(style, seed, True)
        for shots in (*CLAIMED, *LATER):
            starts = {"system": (good, True), "baseline": (None, False), "control": (lost, True)}
            if shots in LATER:
                del starts["control"]
            found = {
                name: float(np.mean([
                    second_stage(style, shots, source, best(warm), 100 * seed + draw)
                    for draw in range(DRAWS)
                ]))
                for name, (source, warm) in starts.items()
            }  # fmt: skip
            more[f"{style}: gain at {shots} shots"] = found["system"] - found["baseline"]
            if shots in CLAIMED:
                units.append(f"{style}, {shots} shots")
                for name, value in found.items():
                    sides[name].append(value)
    more |= {"pre-trained start: rate": best(True), "fresh start: rate": best(False)}
    return Figures(tuple(units), *(tuple(x) for x in sides.values()), more=more)


CLAIM = Claim(
    name="pvp",
    systems=("PVP",),
    statement="accuracy on categories of emoji in new styles after 1 and 2 shots: pre-trained "
    "adapters > fresh ones + 3 points",
    reference="Song 2023, 2304.13639: pre-trained modules gain most where shots are fewest",
    baseline="LoRA from a fresh start, at its own best rate",
    control="modules that were pre-trained on names in random order",
    unit="accuracy",
    assets=("minilm", "emoji_google", "openmoji"),
    run=run,
    margin=0.03,
)
