"""Stage `data`: base states do not depend on the blocks they were computed in."""

import json

import numpy as np
import pytest

from experiments.pipeline import Context, Done
from experiments.stages import base_model, world
from experiments.workdir import StageError


def test_states_are_the_same_in_other_blocks(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setattr(world, "BLOCK", world.BATCH)
    context = Context(tiny_world.config, tmp_path)
    prepared = world.prepare(context)
    pieces = world.pieces(context, prepared)
    assert len(pieces) > 2 and sum(p.size for p in pieces) == len(prepared.texts)
    again = world.build(tiny_world.config, tmp_path, None)
    for name in world.ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(tiny_world, name))
    folder = world.STAGE.folder(context).path
    assert not list(folder.glob("states_*"))  # one file per array is left
    assert json.loads((folder / "settings.json").read_text())["base"] == "tiny"


def test_each_text_has_the_states_that_the_base_gives_it_alone(tiny_world):
    config = tiny_world.config
    prepared = world.prepare(Context(config, None))
    for k in (0, 7, len(prepared.texts) - 1):
        hidden, mask, vector = base_model.states(prepared.base, [prepared.texts[k]], config, 1)
        real = mask[0]
        np.testing.assert_array_equal(tiny_world.mask[k], real)
        np.testing.assert_allclose(tiny_world.hidden[k][real], hidden[0][real], atol=1e-5)
        np.testing.assert_allclose(tiny_world.embedding[k], vector[0], atol=1e-5)


def test_states_of_other_texts_are_refused(tiny_world, tmp_path):
    context = Context(tiny_world.config, tmp_path)
    done = Done(tmp_path, {"content": "sha256 of other texts"})
    with pytest.raises(StageError, match="computed from other texts"):
        world.read(context, world.prepare(context), done)
