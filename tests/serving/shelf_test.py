"""Names stay inside the folder; what is damaged or foreign is refused; the rest is read."""

import numpy as np
import pytest

from jlora.serving.components import components
from jlora.serving.shelf import Memory, Unknown, fetch, folder, forget, listed, read


def test_an_adapter_is_read_as_its_components(llama):
    _, adapters, shelf = llama
    assert listed(shelf) == tuple(sorted(adapters))
    got = read(shelf, "middle")
    np.testing.assert_array_equal(got, components(adapters["middle"], shelf.sites))
    assert got.shape[0] == 8


@pytest.mark.parametrize(
    "name",
    ["../outside", "..", ".", "", "/etc", "small/", "a/b", "small\n", "sm\0all", "ä", "x" * 200,
     "C:\\x", "nobody", "link", "inner", "pickled", 3, None],
)  # fmt: skip
def test_names_that_leave_the_folder_or_are_not_there(foreign, name):
    with pytest.raises(Unknown, match="adapter"):
        folder(foreign, name)


def test_mutation_a_link_would_be_followed_without_the_check(foreign, monkeypatch):
    monkeypatch.setattr(type(foreign.root), "is_relative_to", lambda *_: True)
    assert folder(foreign, "link").name == "link"


@pytest.mark.parametrize(
    ("name", "why"),
    [("damaged", "safetensors"), ("wide", "got rank 20, expected at most 16"),
     ("elsewhere", "mlp"), ("config", "adapter_config.json")],
)  # fmt: skip
def test_what_is_refused_names_the_adapter_and_no_path(foreign, name, why):
    with pytest.raises(ValueError, match=f"adapter '{name}': .*{why}") as error:
        read(foreign, name)
    assert str(foreign.root) not in str(error.value)


def test_a_refused_adapter_changes_nothing_for_others(foreign):
    assert {"damaged", "small"} <= set(listed(foreign))
    assert not {"link", "inner", "pickled"} & set(listed(foreign))
    with pytest.raises(ValueError):
        fetch(foreign, Memory(), "damaged")
    assert len(fetch(foreign, Memory(), "small")[1]) == 4


def test_the_memory_keeps_what_was_used_last(llama):
    shelf = llama[2]
    one = read(shelf, "small").nbytes
    shelf = type(shelf)(shelf.root, shelf.sites, shelf.names, shelf.most, bytes=2 * one)
    memory = Memory()
    for name in ("small", "other", "small", "middle", "small"):
        memory, _ = fetch(shelf, memory, name)
    assert list(memory.kept) == ["small"] and memory.reads == 4
    memory, _ = fetch(shelf, memory, "small")
    assert memory.reads == 4
    assert fetch(shelf, forget(memory, "small"), "small")[0].reads == 5
