"""VB-LoRA and Uni-LoRA of the real PEFT: outputs, and files both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.io import safetensors_file
from jlora.io.errors import FormatError
from tests.io.shared import error, trained

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"up": (8, 12), "down": (12, 8)}
NAMES = jl.io.NameMap({r"(up|down)": r"\1"})
X = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(1)
        for name, (d_in, d_out) in SIZES.items():
            layer = torch.nn.Linear(d_in, d_out, bias=False)
            weight = rng.normal(size=(d_out, d_in)).astype(np.float32) / 3
            layer.weight = torch.nn.Parameter(torch.from_numpy(weight))
            setattr(self, name, layer)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def fn(p, x):
    return x + jnp.tanh(x @ p["up"]) @ p["down"]


PARAMS = {name: jnp.asarray(getattr(Model(), name).weight.detach().numpy().T) for name in SIZES}
TARGETS = {"target_modules": list(SIZES)}
CONFIGS = {
    "vblora": lambda **kw: peft.VBLoRAConfig(r=2, num_vectors=6, vector_length=4, **TARGETS, **kw),
    "unilora": lambda save_indices=True: peft.UniLoraConfig(
        r=2, theta_d_length=24, save_indices=save_indices, **TARGETS
    ),
}


def theirs(name, folder, **options):
    """An adapter of PEFT with noise on what is trained, saved; its outputs."""
    module = peft.get_peft_model(Model(), CONFIGS[name](**options))
    rng = np.random.default_rng(2)
    for parameter in module.parameters():
        if parameter.requires_grad:
            noise = rng.normal(size=parameter.shape).astype(np.float32) / 2
            parameter.data += torch.from_numpy(noise)
    module.save_pretrained(folder)
    return output(module)


def output(module):
    with torch.no_grad():
        return module.eval()(torch.from_numpy(X)).numpy()


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("name", CONFIGS)
def test_files_of_peft_are_read_and_written_back_bitwise(name, tmp_path):
    want = theirs(name, tmp_path / "peft")
    adapter = jl.io.load_peft(tmp_path / "peft", NAMES, PARAMS, layout="in_out")
    assert error(want, fn(PARAMS, X)) > 1e-2
    assert error(jl.lift(fn)(PARAMS, adapter, X), want) < 1e-5
    assert error(fn(jl.merge(PARAMS, adapter), X), want) < 1e-5
    assert "*0" in adapter.trainable and "*0" not in adapter.frozen
    jl.io.save_peft(tmp_path / "again", adapter, NAMES, params=PARAMS)
    assert weights(tmp_path / "again") == weights(tmp_path / "peft")


@pytest.mark.parametrize(
    "method",
    [jl.VBLoRA(rank=3, num_vectors=5, vector_length=2, top_k=3), jl.UniLoRA(rank=3, size=30)],
    ids=["vblora", "unilora"],
)
def test_peft_computes_what_we_do(method, tmp_path):
    adapter = trained(fn, PARAMS, (X,), {"up|down": method})
    jl.io.save_peft(tmp_path, adapter, NAMES, params=PARAMS)
    module = peft.PeftModel.from_pretrained(Model(), tmp_path)
    ours = jl.lift(fn)(PARAMS, adapter, X)
    assert error(ours, fn(PARAMS, X)) > 1e-3
    assert error(ours, output(module)) < 1e-5
    back = jl.io.load_peft(tmp_path, NAMES, PARAMS, layout="in_out")
    assert jax.tree.all(
        jax.tree.map(np.array_equal, back.trainable, adapter.trainable)
    ) and jax.tree.all(jax.tree.map(np.array_equal, back.frozen, adapter.frozen))


def test_files_with_the_best_weights_alone_are_read(tmp_path):
    want = theirs("vblora", tmp_path, save_only_topk_weights=True)
    adapter = jl.io.load_peft(tmp_path, NAMES, PARAMS, layout="in_out")
    assert error(jl.lift(fn)(PARAMS, adapter, X), want) < 1e-5
    grads = jax.grad(lambda t: jnp.sum(jl.lift(fn)(PARAMS, adapter.replace(trainable=t), X)))(
        adapter.trainable
    )
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_mutation_a_transposed_factor_is_seen(tmp_path, monkeypatch):
    want = theirs("vblora", tmp_path)
    composed = jl.VBLoRA.factors

    def swapped(self, p):
        u, v = composed(self, p)
        return u[:, ::-1], v

    monkeypatch.setattr(jl.VBLoRA, "factors", swapped)
    adapter = jl.io.load_peft(tmp_path, NAMES, PARAMS, layout="in_out")
    assert error(jl.lift(fn)(PARAMS, adapter, X), want) > 1e-3


def edited(folder, change):
    tensors, meta = safetensors_file.read(folder / "adapter_model.safetensors")
    tensors = dict(tensors)
    change(tensors)
    safetensors_file.write(folder / "adapter_model.safetensors", tensors, meta)


def test_files_that_do_not_say_all_or_say_it_wrong_are_refused(tmp_path):
    theirs("unilora", tmp_path / "a", save_indices=False)
    with pytest.raises(FormatError, match=r"save_indices = False, expected \(True,\)"):
        jl.io.load_peft(tmp_path / "a", NAMES, PARAMS, layout="in_out")
    theirs("unilora", tmp_path / "b")
    index = "base_model.model.up.unilora_indices_A"
    edited(tmp_path / "b", lambda t: t.update({index: t[index] + 24}))
    with pytest.raises(FormatError, match=r"up: unilora_indices_A: expected integers in 0..23"):
        jl.io.load_peft(tmp_path / "b", NAMES, PARAMS, layout="in_out")
    theirs("vblora", tmp_path / "c")
    edited(tmp_path / "c", lambda t: t.pop("base_model.vblora_vector_bank"))
    with pytest.raises(FormatError, match="vblora_vector_bank"):
        jl.io.load_peft(tmp_path / "c", NAMES, PARAMS, layout="in_out")
