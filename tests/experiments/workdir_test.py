"""Stage folders: committed last, verified when read, damage named."""

import errno
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import pytest

from experiments import cond_pdiff, pipeline, workdir
from experiments.config import Config
from experiments.workdir import Stage, StageError, load_tree, save_tree, steps_kept


class Pair(NamedTuple):
    a: jax.Array
    b: dict


def _tree():
    return Pair(jnp.arange(6.0).reshape(2, 3), {"x/y": jnp.ones((), jnp.int32), "z": jnp.zeros(2)})


def test_trees_come_back_bitwise(tmp_path):
    tree = _tree()
    save_tree(tmp_path / "t", tree)
    back = load_tree(tmp_path / "t", tree)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, tree)
    chex.assert_trees_all_equal(back, tree)


def test_a_killed_save_is_no_checkpoint(tmp_path):
    """Orbax writes next to the place, under a longer name, which may end in digits."""
    assert steps_kept(tmp_path / "nowhere") == []
    for name in ("step_20", "step_9", "step_30.orbax-checkpoint-tmp-17", "step_30.tmp", "steps"):
        (tmp_path / name).mkdir()
    assert [path.name for path in steps_kept(tmp_path)] == ["step_9", "step_20"]


def test_missing_damaged_or_foreign_trees_are_one_clear_error(tmp_path):
    with pytest.raises(StageError, match="no checkpoint here"):
        load_tree(tmp_path / "none", _tree())
    save_tree(tmp_path / "t", _tree())
    with pytest.raises(StageError, match=r"cannot be read|expected shape"):
        load_tree(tmp_path / "t", _tree()._replace(a=jnp.zeros((5, 5))))
    for file in (tmp_path / "t").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:3])
    with pytest.raises(StageError, match="cannot be read"):
        load_tree(tmp_path / "t", _tree())


def test_a_stage_is_done_only_after_commit_and_notices_damage(tmp_path):
    stage = Stage(tmp_path, "zoo", "abc")
    with pytest.raises(StageError, match="not finished"):
        stage.verify()
    (stage.open() / "data.bin").write_bytes(b"12345")
    assert not stage.done
    stage.commit({"n": 1})
    assert stage.done and stage.verify() == {"n": 1}
    (stage.path / "data.bin").write_bytes(b"1234")
    with pytest.raises(StageError, match=r"data\.bin: damaged \(expected 5 bytes"):
        stage.verify()
    (stage.path / "data.bin").write_bytes(b"12346")  # same size, one bit
    with pytest.raises(StageError, match="damaged"):
        stage.verify()
    (stage.path / "data.bin").unlink()
    with pytest.raises(StageError, match="missing"):
        stage.verify()


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "link/secret", "a\\b"])
def test_files_that_a_record_names_outside_of_the_stage_are_refused(name, tmp_path):
    (tmp_path / "secret").write_bytes(b"12345")
    stage = Stage(tmp_path, "zoo", "abc")
    (stage.open() / "link").symlink_to(tmp_path, target_is_directory=True)
    size = [5, workdir.digest(tmp_path / "secret")]
    workdir.write_json(stage.path / "DONE.json", {"files": {name: size}, "info": {}})
    with pytest.raises(StageError, match="expected the plain name of a file inside"):
        stage.verify()


def test_a_full_disk_is_said_in_one_line(tmp_path):
    below_orbax = ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device")
    for error in (OSError(errno.ENOSPC, "No space left on device"), below_orbax):
        text = workdir.explain_failed_write(error, tmp_path)
        assert "the disk is full" in text and "finished stages are kept" in text
    assert workdir.explain_failed_write(ValueError("rank: got 0"), tmp_path) is None


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("", "got no JSON"),
        ("{", "got no JSON"),
        ("[]", "got list, expected a JSON object"),
        ("{}", r"got keys \[\], expected 'files'"),
        ('{"files": {"a": 3}, "info": {}}', "expected 'files'"),
        ('{"files": {}, "info": 3}', "and 'info' {}"),
    ],
)
def test_a_marker_that_is_no_record_of_a_stage_is_one_line(tmp_path, text, got):
    stage = Stage(tmp_path, "zoo", "abc")
    marker = stage.open() / "DONE.json"
    marker.write_text(text)
    with pytest.raises(
        StageError, match=rf"DONE\.json: .*{got}.*; delete .* and run 'zoo'"
    ) as error:
        stage.verify()
    assert "\n" not in str(error.value)


def test_a_marker_of_other_bytes_is_one_line(tmp_path):
    (Stage(tmp_path, "zoo", "abc").open() / "DONE.json").write_bytes(b"\xff\x00")
    with pytest.raises(StageError, match=r"DONE\.json: got no JSON"):
        Stage(tmp_path, "zoo", "abc").verify()


@pytest.mark.parametrize("text", ["{", "3", '{"zoo": "long"}'])
def test_damaged_times_are_found_at_the_start_by_path(tmp_path, text):
    (tmp_path / "times.json").write_text(text)
    with pytest.raises(StageError, match=r"times\.json: got .*, expected .*; delete it"):
        pipeline.run(cond_pdiff.stages(), ["data"], pipeline.Context(Config(), tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["times.json"]
