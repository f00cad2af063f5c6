"""The file of jobs: what is shared, what is a job's own, and one line for what is wrong."""

import pytest

from experiments.tuning import jobs_file

GOOD = """
base: model
capacity: 64
block: 8
lr: 1
rank: 4
jobs:
  - {name: a, data: a.jsonl}
  - {name: b, data: sub/b.jsonl, rank: 2, lr: 1.0e-4, batch: 3}
"""


def write(folder, text):
    path = folder / "jobs.yaml"
    path.write_text(text)
    return path


def test_a_job_overrides_what_is_shared(tmp_path):
    got = jobs_file.read(write(tmp_path, GOOD))
    assert (got.capacity, got.block, got.rows) == (64, 8, jobs_file.ROWS)
    a, b = (t.settings for t in got.tasks)
    assert [t.name for t in got.tasks] == ["a", "b"]
    assert (a.rank, a.lr, a.base) == (4, 1.0, str(tmp_path / "model"))
    assert (b.rank, b.lr, b.batch, b.data) == (2, 1e-4, 3, str(tmp_path / "sub/b.jsonl"))


@pytest.mark.parametrize(("old", "new", "said"), [
    ("base: model", "base: [", "not YAML: "),
    ("base: model", "bas: model", r"got 'bas', expected one of \['alpha', "),
    ("lr: 1\n", "lr: 1\nlr: 2\n", "line 6: got the key 'lr' twice"),
    ("rank: 4", "rank: 4.5", r"jobs\[0\] \(a\): rank: got 4.5, expected int"),
    ("rank: 2", "targets: x", r"jobs\[1\] \(b\): got 'targets', expected one of"),
    ("lr: 1.0e-4", "lr: -1.0", r"jobs\[1\] \(b\): lr: got -1.0, expected > 0"),
    ("name: b", "name: a", r"jobs\[1\]: name: got 'a', expected each name once"),
    ("name: b", "name: ../b", r"jobs\[1\]: name: got '\.\./b', expected letters"),
    ("block: 8", "block: 0", "block: got 0, expected an integer of at least 1"),
    ("data: a.jsonl", "rank: 3", r"jobs\[0\] \(a\): data: got '', expected a path"),
    (GOOD, "jobs: []", "jobs: expected a list of at least one job"),
    (GOOD, "jobs: [1]", r"jobs\[0\]: got int, expected a mapping"),
])  # fmt: skip
def test_what_is_wrong_is_one_line(tmp_path, old, new, said):
    path = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ValueError, match=said) as error:
        jobs_file.read(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_no_such_file(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        jobs_file.read(tmp_path / "none.yaml")
