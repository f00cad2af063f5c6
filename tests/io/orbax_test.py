"""Checkpoints of adapters: bitwise, checked, and one error for everything that is wrong."""

import dataclasses
import gc
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jlora as jl
from jlora.io import FormatError, orbax, restore_adapter, save_adapter
from jlora.methods.selective.ia3 import IA3
from jlora.methods.shared_basis.vera import VeRA

PARAMS = {
    "layers": {"q": jnp.ones((3, 8, 8)), "v": jnp.ones((3, 8, 8))},
    "head": {"kernel": jnp.ones((8, 4), jnp.bfloat16)},
}


def model(params, x):
    def layer(x, p):
        return jnp.tanh(x @ p["q"] + x @ p["v"]), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return x.astype(jnp.bfloat16) @ params["head"]["kernel"]


def make(seed=0, rank=2, **methods):
    methods = methods or {"layers/q": jl.LoRA(rank, 3.0, freeze_a=True), "head": jl.LoRA(1)}
    key = jax.random.key(seed)
    fresh = jl.init(key, model, PARAMS, jnp.ones((2, 8)), methods=methods)
    noise = jax.tree.map(lambda t: t + jax.random.normal(key, t.shape, t.dtype), fresh.trainable)
    return fresh.replace(trainable=noise)


def assert_same(x, y):
    assert jax.tree.structure(x) == jax.tree.structure(y)
    assert x.sites == y.sites
    assert [m for _, m in x.sites] == [m for _, m in y.sites]
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A finished checkpoint, to be copied before it is damaged."""
    path = tmp_path_factory.mktemp("orbax") / "adapter"
    adapter = make()
    save_adapter(path, adapter)
    return path, adapter


def test_round_trip_of_adapters_and_banks_is_bitwise(saved, tmp_path):
    path, adapter = saved
    back = restore_adapter(path)
    assert_same(adapter, back)
    assert back.sites[1][1].alpha == 3.0
    assert_same(adapter, restore_adapter(path, like=make(seed=1)))
    bank = jl.stack([adapter, make(seed=1)])
    bank = bank.replace(trainable=jax.tree.map(lambda t: t.at[0].mul(jnp.nan), bank.trainable))
    save_adapter(tmp_path / "bank", bank)
    assert_same(bank, restore_adapter(tmp_path / "bank"))


@pytest.mark.parametrize("kind", ["home", "more", "file", "link", "empty", "part"])
def test_overwriting_keeps_what_is_no_checkpoint(kind, saved, tmp_path):
    path, adapter = saved
    target = tmp_path / "a"
    if kind == "file":
        target.write_text("notes")
    elif kind == "link":
        shutil.copytree(path, tmp_path / "b")
        target.symlink_to(tmp_path / "b", target_is_directory=True)
    elif kind == "more":
        shutil.copytree(path, target)
        (target / "notes").write_text("mine")
    else:
        target.mkdir()
        if kind != "empty":
            (target / ("meta" if kind == "part" else "thesis.tex")).mkdir()
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(FormatError, match="it is kept"):
        save_adapter(target, adapter, overwrite=True)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_shared_tensors_and_every_kind_of_field(tmp_path):
    adapter = make(**{"layers/q": VeRA(rank=4, seed=3), "layers/v": IA3("in")})
    save_adapter(tmp_path / "a", adapter)
    assert_same(adapter, restore_adapter(tmp_path / "a"))


def test_shards_come_back_where_like_wants_them(saved):
    path, adapter = saved
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(t):
        spec = (
            PartitionSpec(*[None] * (t.ndim - 1), "x") if t.shape[-1:] == (8,) else PartitionSpec()
        )
        return jax.device_put(t, NamedSharding(mesh, spec))

    like = jax.tree.map(place, adapter)
    back = restore_adapter(path, like=like)
    assert_same(adapter, back)
    b = back.trainable["layers/q"]["b"]
    assert len(b.sharding.device_set) == 8 and b.addressable_shards[0].data.shape == (3, 2, 1)


@pytest.mark.parametrize(
    ("like", "why"),
    [
        (dict(rank=4), r"got method .*'rank': 2.*expected .*'rank': 4"),
        ({"layers/q": jl.LoRA(2), "head": jl.LoRA(1)}, "got method"),
        ({"layers/q": jl.LoRA(2, freeze_a=True)}, "site 0"),
        ({"layers/(q|v)": jl.LoRA(2), "head": jl.LoRA(1)}, "site 2|has 2 sites|got method"),
        ({"layers/q": IA3(), "head": jl.LoRA(1)}, "got method"),
    ],
)
def test_another_adapter_than_expected_is_refused(saved, like, why):
    with pytest.raises(FormatError, match=why):
        restore_adapter(saved[0], like=make(**like))


def test_another_shape_or_name_than_expected_is_refused(saved):
    path, adapter = saved
    wide = jax.tree.map(lambda t: jnp.zeros((2, *t.shape), t.dtype), adapter)
    with pytest.raises(FormatError, match=r"got .*\[8, 1\].*expected .*\[2, 8, 1\]"):
        restore_adapter(path, like=wide)
    more = {**adapter.frozen, "head/kernel": {"mask": jnp.ones(1)}}
    with pytest.raises(FormatError, match="missing arrays"):
        restore_adapter(path, like=adapter.replace(frozen=more))


# When one read fails, Orbax closes its event loop under the reads that are still on their way. They
# complain when they are collected: here, and not in whatever test runs then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_file_truncated_or_missing_is_one_error(saved, tmp_path):
    path, adapter = saved
    files = sorted(p.relative_to(path) for p in path.rglob("*") if p.is_file())
    assert len(files) >= 8
    silent = []
    for number, name in enumerate(files):
        for how in ("gone", "short", "flip"):
            copy = shutil.copytree(path, tmp_path / f"{number}{how}")
            data = (copy / name).read_bytes()
            if how == "gone":
                (copy / name).unlink()
            elif how == "short":
                (copy / name).write_bytes(data[: len(data) // 2])
            else:
                middle = len(data) // 2
                flipped = bytes([data[middle] ^ 0x55])
                (copy / name).write_bytes(data[:middle] + flipped + data[middle + 1 :])
            try:
                assert_same(adapter, restore_adapter(copy))  # harmless, or
                silent.append((str(name), how))
            except FormatError as error:  # one clear error
                assert str(copy) in str(error)
    gc.collect()
    needed = {str(name) for name in files} - {name for name, how in silent if how == "gone"}
    assert {"meta/metadata", "arrays/manifest.ocdbt"} <= needed, needed


def test_missing_unfinished_and_foreign_directories(saved, tmp_path):
    with pytest.raises(FormatError, match="no such checkpoint"):
        restore_adapter(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="damaged or unfinished"):
        restore_adapter(tmp_path / "empty")
    with pytest.raises(FormatError, match="exists already"):
        save_adapter(saved[0], saved[1])


def test_overwriting_replaces(tmp_path):
    save_adapter(tmp_path / "a", make())
    save_adapter(tmp_path / "a", make(seed=1), overwrite=True)
    assert_same(make(seed=1), restore_adapter(tmp_path / "a"))


@dataclasses.dataclass(frozen=True)
class Foreign(jl.LoRA):
    """A user's own method."""

    what: object = None


def edit(path, change):
    name = next(p for p in (path / "meta").iterdir() if p.name == "metadata")
    meta = json.loads(name.read_text())
    del meta["crc32"]
    change(meta)
    meta["crc32"] = orbax._crc_json(meta)
    name.write_text(json.dumps(meta))


def test_methods_of_others_need_like_and_no_module_is_imported(saved, tmp_path):
    adapter = make(**{"layers/q": Foreign(2)})
    save_adapter(tmp_path / "a", adapter)
    with pytest.raises(FormatError, match="not the library's; pass `like`"):
        restore_adapter(tmp_path / "a")
    assert_same(adapter, restore_adapter(tmp_path / "a", like=adapter))
    with pytest.raises(FormatError, match="JSON cannot say"):
        save_adapter(tmp_path / "b", make(**{"layers/q": Foreign(2, what=object())}))
    assert not (tmp_path / "b").exists()
    for name in (
        "os:system",
        "jlora.methods.lora:math",
        "jlora.methods.lora.x:LoRA",
        "lora",
    ):
        copy = shutil.copytree(saved[0], tmp_path / name.replace(":", "_"))
        edit(copy, lambda meta, name=name: meta["sites"][0]["method"].update(type=name))
        with pytest.raises(FormatError, match=r"not the library's|is no method"):
            restore_adapter(copy)


def test_changed_weights_are_noticed(saved, tmp_path, monkeypatch):
    def change(meta):
        meta["arrays"][0]["crc32"] ^= 1

    copy = shutil.copytree(saved[0], tmp_path / "copy")
    edit(copy, change)
    with pytest.raises(FormatError, match="trainable head/kernel/a: crc32"):
        restore_adapter(copy)
    monkeypatch.setattr(orbax, "_crc", lambda array: None)  # the mutation check
    assert_same(saved[1], restore_adapter(copy))
