"""Every reader on files that are empty, foreign or hostile: one error, one line, nothing written.

A row is (what the file is, what makes it); each reader meets each. "Foreign" is what people really
put in by mistake: a whole model, an adapter of another program, a prompt, a file without tensors.
"""

import json
import os
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.io import FormatError, NameMap, safetensors_file

NAMES = NameMap({r"(\d)/q": r"blocks.\1.q"})
SITES = [jl.Site(f"{k}/q", (4, 6), "io", jnp.dtype("float32"), ("dot",)) for k in "01"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}


class Reader(NamedTuple):
    """How one reader's files look, and how it is called."""

    load: object  # folder -> Adapter
    key: str  # of a module's tensor, with {module} and {end}
    ends: tuple[str, str]  # of the two factors


READERS = {
    "peft": Reader(
        lambda folder: jl.io.load_peft(folder, NAMES, SITES),
        "base_model.model.{module}.{end}",
        ("lora_A.weight", "lora_B.weight"),
    ),
    "kohya": Reader(
        lambda folder: jl.io.load_kohya(folder / WEIGHTS, NAMES, SITES),
        "lora_unet_{flat}.{end}",
        ("lora_down.weight", "lora_up.weight"),
    ),
    "diffusers": Reader(
        lambda folder: jl.io.load_diffusers(folder / WEIGHTS, NAMES, SITES),
        "transformer.{module}.{end}",
        ("lora_A.weight", "lora_B.weight"),
    ),
    "orbax": Reader(lambda folder: jl.io.restore_adapter(folder), "{module}.{end}", ("a", "b")),
}


def key(reader, module, end):
    return READERS[reader].key.format(module=module, flat=module.replace(".", "_"), end=end)


def good(reader, modules=("blocks.0.q", "blocks.1.q")):
    first, second = READERS[reader].ends
    tensors = {}
    for module in modules:
        tensors[key(reader, module, first)] = np.ones((2, 4), np.float32)
        tensors[key(reader, module, second)] = np.ones((6, 2), np.float32)
    return tensors


def put(folder, tensors, config=LORA, header=None):
    safetensors_file.write(folder / WEIGHTS, tensors, header or {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config))


def raw(folder, data, config=LORA):
    (folder / WEIGHTS).write_bytes(data)
    (folder / CONFIG).write_text(json.dumps(config))


def renamed(name):
    """The good file with one module called otherwise."""

    def make(folder, reader):
        module = name.format(out=folder.parent / "elsewhere")
        put(folder, good(reader, ("blocks.0.q", module)))

    return make


def model(folder, reader):
    put(folder, {f"blocks.{k}.q.weight": np.ones((6, 4), np.float32) for k in range(2)})


def other_format(folder, reader):
    put(folder, good("diffusers" if reader == "kohya" else "kohya"))


def other_component(folder, reader):
    tensors = {f"text_encoder.{k}": t for k, t in good(reader).items()}
    put(folder, tensors)


def prompt(folder, reader):
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}
    put(folder, {"prompt_embeddings": np.ones((2, 4), np.float32)}, config)


def link(folder, reader):
    (folder.parent / "secret").write_text("secret")
    os.symlink(folder.parent / "secret", folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(LORA))


BAD = {
    "nothing there": lambda folder, reader: None,
    "no bytes": lambda folder, reader: raw(folder, b""),
    "no tensors": lambda folder, reader: put(folder, {}),
    "metadata alone": lambda folder, reader: put(
        folder, {}, header={"lora_adapter_metadata": "{}"}
    ),
    "text": lambda folder, reader: raw(folder, b"version https://git-lfs.github.com/spec/v1\n"),
    "a pickle": lambda folder, reader: raw(folder, b"\x80\x04\x95" + 64 * b"x"),
    "a zip": lambda folder, reader: raw(folder, b"PK\x03\x04" + 64 * b"\x00"),
    "a folder": lambda folder, reader: (folder / WEIGHTS).mkdir(),
    "a link to text": link,
    "another config": lambda folder, reader: put(folder, {}, config=[1, 2]),
    "a whole model": model,
    "another format": other_format,
    "another component": other_component,
    "a prompt": prompt,
    "a module of no site": renamed("blocks.7.q"),
    "a parent": renamed("../../blocks.0.q"),
    "an absolute path": renamed("{out}/q"),
    "dots alone": renamed(".."),
    "a long name": renamed("x" * 900),
    "a pattern": renamed("(a|aa)+b"),
    "a template": renamed("blocks.{{i}}.q"),
}
# An Orbax checkpoint is a directory of its own: safetensors in it are all foreign.


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("reader", READERS)
def test_a_bad_file_is_one_error_of_one_line(reader, bad, tmp_path):
    folder = tmp_path / "deep" / "adapter"
    folder.mkdir(parents=True)
    BAD[bad](folder, reader)
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(FormatError) as caught:
        READERS[reader].load(folder)
    text = str(caught.value)
    assert text.startswith(str(folder)), "it names the file"
    assert "\n" not in text and len(text) < 1500, text
    assert sorted(p for p in tmp_path.rglob("*")) == before, "nothing is written"


@pytest.mark.parametrize("reader", ["peft", "kohya", "diffusers"])
def test_the_good_file_is_read(reader, tmp_path):
    """What makes the rows above mean something."""
    put(tmp_path, good(reader))
    assert [site.path for site, _ in READERS[reader].load(tmp_path).sites] == ["0/q", "1/q"]


@pytest.mark.parametrize(
    ("reader", "tensors", "words"),
    [
        ("peft", {}, "no tensor of a LORA adapter; it has no tensors at all"),
        ("kohya", {}, "no key starts with 'lora_unet_'; it has no tensors at all"),
        ("diffusers", {}, "no key starts with 'transformer.'; it has no tensors at all"),
    ],
)
def test_a_reader_that_found_nothing_says_what_it_saw(reader, tensors, words, tmp_path):
    put(tmp_path, tensors)
    with pytest.raises(FormatError, match=words):
        READERS[reader].load(tmp_path)
    put(tmp_path, {"unet.q.lora_A.weight": np.ones((2, 4), np.float32)})
    if reader == "diffusers":
        with pytest.raises(FormatError, match=r"keys are such as \['unet.q.lora_A.weight'\]"):
            jl.io.load_diffusers(tmp_path / WEIGHTS, NAMES, SITES, others="leave")
    if reader == "kohya":
        with pytest.raises(FormatError, match=r"keys are such as \['unet.q.lora_A.weight'\]"):
            jl.io.load_kohya(tmp_path / WEIGHTS, NAMES, SITES, others="leave")


@pytest.mark.parametrize("reader", ["kohya", "diffusers"])
def test_messages_name_the_keys_of_the_file(reader, tmp_path):
    """No `lora_A` of PEFT where the file has `lora_down`; the component as the file has it."""
    for end, shape in (("first", (2, 5)), ("second", (7, 2))):
        tensors = good(reader)
        name = key(reader, "blocks.1.q", READERS[reader].ends[end == "second"])
        put(tmp_path, {**tensors, name: np.ones(shape, np.float32)})
        with pytest.raises(FormatError) as caught:
            READERS[reader].load(tmp_path)
        text = str(caught.value)
        module, suffix = name.split(".lora_")
        assert module in text and f"lora_{suffix} has shape {list(shape)}, expected" in text
        for foreign in ("base_model", "config", "lora_A" if reader == "kohya" else "lora_down"):
            assert foreign not in text.removeprefix(str(tmp_path)), text
    tensors = good(reader)
    del tensors[key(reader, "blocks.1.q", READERS[reader].ends[1])]
    put(tmp_path, tensors)
    with pytest.raises(FormatError, match=READERS[reader].ends[0]):
        READERS[reader].load(tmp_path)


def test_an_adapter_without_sites_is_no_checkpoint(tmp_path):
    with pytest.raises(FormatError, match="without sites changes nothing"):
        jl.io.save_adapter(tmp_path / "x", jl.Adapter({}, {}, ()))
    assert not (tmp_path / "x").exists()
