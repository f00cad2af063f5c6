"""What all readers of a Hugging Face directory share."""

from jlora.models.hf import read_config


def test_a_byte_order_mark_in_front_of_the_configuration_is_left_aside(tmp_path):
    (tmp_path / "config.json").write_bytes('{"hidden_size": 8}'.encode("utf-8-sig"))
    assert read_config(tmp_path, dict, {"width": "hidden_size"}, {}, ()) == {"width": 8}
