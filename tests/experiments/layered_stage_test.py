"""The stage of the layered generator: accuracy of what it writes, its controls, its sentence."""

import jax
import numpy as np
import pytest

import jlora as jl
from experiments.pipeline import Context
from experiments.stages import conditions, layered, layered_stage, rivals, world
from experiments.stages.report import layered_note


@pytest.fixture(scope="module")
def context(tiny_world, tiny_encoded, tmp_path_factory):
    start = Context(tiny_world.config, tmp_path_factory.mktemp("run"))
    return start.add("data", tiny_world).add("codec", tiny_encoded)


@pytest.fixture(scope="module")
def results(context):
    return layered_stage.STAGE.run(context)


def test_figures_are_those_of_the_adapter_merged_into_the_base(
    tiny_world, tiny_encoded, results, bar
):
    """The stage multiplies factors; here an adapter is merged, and the base runs as it is."""
    held = rivals.held_out(tiny_world, tiny_encoded)
    assert set(results.accuracy) == set(held) != set()
    fitted = layered.fit(tiny_world, tiny_encoded.names, bar)
    apply = world.classifier(tiny_world.model, tiny_world.config.head_scale)
    run = jax.jit(lambda params, *rows: apply(params, *rows).argmax(-1))
    for name in held[:2]:
        few, test = conditions.examples(tiny_world, name), tiny_world.rows[name, "test"]
        head = tiny_world.head_of(name)[: tiny_world.task(name).classes]
        features = layered.read(tiny_world, few.index).features
        adapter = layered.adapter(
            tiny_world, *layered.factors(tiny_world, fitted, features, few.label, head)
        )
        params = jl.merge(tiny_world.upper, adapter)
        wide = np.broadcast_to(head, (len(test.index), *head.shape))
        got = run(params, tiny_world.hidden[test.index], tiny_world.mask[test.index], wide)
        assert results.accuracy[name] == {"layered": float(np.mean(np.asarray(got) == test.label))}


def test_controls_are_other_adapters(tiny_world, tiny_encoded, results, bar):
    """Shuffled labels and a generator without memory are scored as such."""
    assert set(results.controls) == set(layered_stage.CONTROLS)
    fitted = layered.fit(tiny_world, tiny_encoded.names, bar)
    rows = [
        layered_stage.accuracies(tiny_world, fitted, name)
        for name in rivals.held_out(tiny_world, tiny_encoded)
    ]
    for key, value in results.controls.items():
        assert value == pytest.approx(np.mean([row[key] for row in rows]))
    assert any(row["shuffled"] != row["layered"] for row in rows)


def test_the_stage_is_read_again_and_says_what_it_is(context, results):
    assert layered_stage.STAGE.run(context) == results  # from its folder
    (note,) = layered_note(results)
    assert "shuffled" in note and "no class remembered" in note
    assert "held-out tasks" in layered_stage.STAGE.describe(results)
    nothing = layered_stage.Results({}, {})
    assert layered_note(nothing) == [] and "no held-out" in layered_stage.STAGE.describe(nothing)
