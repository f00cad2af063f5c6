"""Adapters that PEFT starts elsewhere: what a file means with the base, or why it means nothing."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.io.errors import FormatError
from jlora.io.peft import started as module
from tests.io.shared import error

NAMES = jl.io.NameMap({"w0": "0", "w1": "2"})


def model(params, x):
    return jnp.tanh(x @ params["w0"]) @ params["w1"]


class Base:
    def __init__(self):
        rng = np.random.default_rng(5)
        self.weights = [rng.normal(size=s).astype("f4") / 2 for s in ((8, 6), (6, 5))]
        self.params = {f"w{k}": jnp.asarray(w) for k, w in enumerate(self.weights)}
        self.x = rng.normal(size=(4, 8)).astype("f4")

    def torch(self):
        torch = pytest.importorskip("torch")
        layers = [torch.nn.Linear(*w.shape, bias=False) for w in self.weights]
        for layer, w in zip(layers, self.weights, strict=True):
            layer.weight.data = torch.tensor(w.T)
        return torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1])

    def saved(self, folder, init, **more):
        """PEFT's directory of a moved adapter, and what PEFT computes when it loads it anew."""
        peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
        config = peft.LoraConfig(
            r=2, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=init, **more
        )
        tuned = peft.get_peft_model(self.torch(), config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in tuned.named_parameters():
                if "lora_" in name:
                    p += 0.2 * torch.randn(p.shape, generator=generator)
            before = tuned(torch.tensor(self.x)).numpy()
            tuned.save_pretrained(folder)
            again = peft.PeftModel.from_pretrained(self.torch(), folder)
            return before, again(torch.tensor(self.x)).numpy()


@pytest.fixture(scope="module")
def base():
    return Base()


def check_read(base, folder, init):
    before, again = base.saved(folder, init)
    assert error(before, again) <= 1e-5
    adapter = jl.io.load_peft(folder, NAMES, base.params, layout="in_out")
    got = model(jl.merge(base.params, adapter), base.x)
    assert error(got, again) <= 1e-5
    return adapter


@pytest.mark.parametrize("init", ["pissa", "olora", "gaussian", "orthogonal", "eva"])
@pytest.mark.filterwarnings("ignore:.*eva.*")
def test_peft_computes_what_we_read(base, tmp_path, init):
    """The base in memory is the one before PEFT changed it."""
    adapter = check_read(base, tmp_path, init)
    changes = init in ("pissa", "olora")
    assert {isinstance(m, jl.Residual) for _, m in adapter.sites} == {changes}


def test_mutation_a_start_that_is_forgotten_is_seen(base, tmp_path, monkeypatch):
    good = module.principal
    monkeypatch.setattr(module, "principal", lambda *args: [0 * t for t in good(*args)])
    with pytest.raises(AssertionError):
        check_read(base, tmp_path, "pissa")


def test_what_we_read_goes_back_as_lora_of_twice_the_rank(base, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    adapter = check_read(base, tmp_path / "theirs", "pissa")
    with pytest.raises(FormatError, match=r"no place for Residual.*jl\.inits\.fold"):
        jl.io.save_peft(tmp_path / "ours", adapter, NAMES)
    jl.io.save_peft(tmp_path / "ours", jl.inits.fold(adapter), NAMES)
    theirs = peft.PeftModel.from_pretrained(base.torch(), tmp_path / "ours")
    got = model(jl.merge(base.params, adapter), base.x)
    assert error(got, theirs(torch.tensor(base.x)).detach().numpy()) <= 1e-5


@pytest.mark.parametrize("init", ["corda", "lora_ga", "pissa_niter_4", "loftq"])
def test_a_base_that_is_lost_is_refused(base, tmp_path, init):
    """PEFT reads these with the wrong base, or not at all."""
    base.saved(tmp_path, "gaussian")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": init}))
    with pytest.raises(FormatError, match=f"init_lora_weights = '{init}'.*is not in the file"):
        jl.io.load_peft(tmp_path, NAMES, base.params, layout="in_out")


def test_sites_alone_do_not_say_what_the_start_was(base, tmp_path):
    base.saved(tmp_path, "olora")
    with pytest.raises((FormatError, ValueError), match=r"params|parameters|weight"):
        jl.io.load_peft(tmp_path, NAMES, jl.sites(model, base.params, base.x))
