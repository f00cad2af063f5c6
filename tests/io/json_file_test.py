"""JSON of others: one error of one line with path, got and expected."""

import pytest

from jlora.io import FormatError
from jlora.io.json_file import read_json

BAD = {
    "": "got no JSON .*, expected a JSON object",
    "{": "got no JSON",
    "[1]": "got list, expected a JSON object",
    '{"a": 1, "a": 2}': "duplicate key 'a'",
    '{"a": NaN}': "NaN is not JSON",
    "[" * 100_000: "got no JSON",
    "\udcff": "got no JSON .*utf-8",
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_what_is_no_object_is_one_line(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(FormatError, match=rf"x\.json: .*{BAD[text]}") as error:
        read_json(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_file_that_is_not_there_and_a_folder(tmp_path):
    with pytest.raises(FormatError, match=r"x\.json: missing, expected a JSON list"):
        read_json(tmp_path / "x.json", list)
    with pytest.raises(FormatError, match=r"cannot be read .*expected a JSON object"):
        read_json(tmp_path)


def test_what_is_good(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [1]}')
    assert read_json(path) == {"a": [1]}
    path.write_text("[NaN]")
    assert read_json(path, list, constants=True)[0] != 0
