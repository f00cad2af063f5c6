"""Names that files hold: none leaves its folder, whichever way it is written."""

import pytest

from jlora.io import FormatError
from jlora.io.inside import inside

HOSTILE = (
    "/etc/passwd", "../x", "a/../../x", "a/..", "..", ".", "", "a//b", "a/", "./a", "C:\\x", "C:x",
    "..\\x", "\\\\host\\share", "a\nb", "a\0b", "x" * 2000, 7, None, ["a"], "link/x", "a/link/x",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in/a").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/x").write_text("secret")
    for link in ("in/link", "in/a/link"):
        (tmp_path / link).symlink_to(tmp_path / "out", target_is_directory=True)
    return tmp_path / "in"


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_leave_the_folder_are_refused(name, folder):
    with pytest.raises(FormatError, match=r"index\.json: got the file name .*expected") as error:
        inside(folder, name, folder / "index.json")
    assert len(str(error.value)) < 600


def test_names_inside_are_paths_inside(folder):
    for name in ("model.safetensors", "a/b.json", "new/part-00001", "a.b..c", "ö", ".hidden"):
        assert inside(folder, name, "x") == folder / name


def test_a_link_to_a_file_is_read_as_in_the_cache_of_hugging_face(folder):
    (folder / "model.safetensors").symlink_to(folder.parent / "out/x")
    assert inside(folder, "model.safetensors", "x").read_text() == "secret"
    (folder.parent / "snapshot").symlink_to(folder, target_is_directory=True)
    assert inside(folder.parent / "snapshot", "a/b", "x") == folder.parent / "snapshot/a/b"
