"""Activated LoRA and starts as PEFT has them: its files read, run, and written back bitwise."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora import methods
from jlora.io import FormatError
from jlora.io.peft import wrapped
from tests.io.peft.starts_test import NAMES, Base
from tests.io.peft.starts_test import model as small
from tests.io.shared import error, torch_model, torch_output, trained

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SITES = r"layers/attention/(query|value)/kernel"


def config(path):
    return json.loads((path / CONFIG).read_text())


def changed(path, **fields):
    (path / CONFIG).write_text(json.dumps(config(path) | fields))


@pytest.mark.parametrize(("row", "tokens", "want"), [
    ([5, 7, 8, 5, 7, 8, 9], (7, 8), [0, 0, 0, 0, 1, 1, 1]),  # the last occurrence
    ([7, 7, 7, 1, 2, 3, 4], (7, 7), [0, 1, 1, 1, 1, 1, 1]),  # occurrences that overlap
    ([7, 1, 2, 3, 4, 5, 8], (8,), [0, 0, 0, 0, 0, 0, 1]),
    ([8, 1, 2, 3, 4, 5, 7], (7, 8), [0, 0, 0, 0, 0, 0, 0]),  # not around the end
    ([1, 2, 3, 4, 5, 6, 7], (6, 7), [0, 0, 0, 0, 0, 1, 1]),
])  # fmt: skip
def test_tokens_from_the_last_invocation_on(row, tokens, want):
    assert wrapped.invoked(jnp.asarray([row, row]), tokens).tolist() == [list(map(bool, want))] * 2


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_activated_lora_of_real_peft(golden, tmp_path):
    """Tokens before the sequence are the base's, as are rows without it."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    model = golden["llama"]
    ids = np.asarray(model.args[0])
    sequence = [int(t) for t in ids[0, 2:4]]
    torch.manual_seed(0)
    tuned = peft.get_peft_model(torch_model(model), peft.LoraConfig(
        r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False,
        alora_invocation_tokens=sequence, task_type="CAUSAL_LM"))  # fmt: skip
    tuned.save_pretrained(tmp_path / "theirs")
    want = torch_output(tuned, model)
    adapter = jl.io.load_peft(tmp_path / "theirs", model.names, model.params, layout="in_out")
    assert all(m == jl.TokenMask(jl.LoRA(2, alpha=8)) for _, m in adapter.sites)
    assert {vars(m)["invocation"] for _, m in adapter.sites} == {tuple(sequence)}

    def run(mask):
        return jl.lift(model.fn)(model.params, adapter, *model.args, ctx={"tokens": mask})

    mask = jl.io.invoked(model.args[0], sequence)
    assert not mask[0, :2].any() and mask[0, 2:].all()
    assert error(run(mask), want) <= 1e-5
    assert error(run(jnp.ones_like(mask)), want) > 1e-3, "PEFT does mask"
    jl.io.save_peft(tmp_path / "ours", adapter, model.names, task_type="CAUSAL_LM")
    assert config(tmp_path / "ours")["alora_invocation_tokens"] == sequence
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (
        tmp_path / "theirs" / WEIGHTS
    ).read_bytes()
    again = peft.PeftModel.from_pretrained(torch_model(model), tmp_path / "ours")
    np.testing.assert_array_equal(torch_output(again, model), want)
    back = jl.io.load_peft(tmp_path / "ours", model.names, model.params, layout="in_out")
    chex.assert_trees_all_equal(adapter, back)
    for bad in ([], "all", [-1], [1.5]):
        changed(tmp_path / "ours", alora_invocation_tokens=bad)
        with pytest.raises(FormatError, match="expected token numbers, at least one"):
            jl.io.load_peft(tmp_path / "ours", model.names, model.params, layout="in_out")


@pytest.mark.parametrize(("wanted", "message"), [
    ({SITES: jl.TokenMask(jl.LoRA(2))}, r"invocations \[\(\)\], expected one token sequence"),
    ({SITES: jl.TokenMask(jl.DoRA(2), invocation=(1,))}, "query.*expected TokenMask around LoRA"),
    ({"layers/attention/query/kernel": jl.TokenMask(jl.LoRA(2), invocation=(1,)),
      "layers/attention/value/kernel": jl.LoRA(2)}, "value.*expected TokenMask around LoRA"),
    ({"layers/attention/query/kernel": jl.TokenMask(jl.LoRA(2), invocation=(1,)),
      "layers/attention/value/kernel": jl.TokenMask(jl.LoRA(2), invocation=(1, 2))},
     "expected one token sequence"),
])  # fmt: skip
def test_masks_that_peft_cannot_say(golden, tmp_path, wanted, message):
    model = golden["llama"]
    adapter = jl.init(jax.random.key(0), model.fn, model.params, *model.args, methods=wanted)
    with pytest.raises(FormatError, match=message):
        jl.io.save_peft(tmp_path / "never", adapter, model.names)
    assert not (tmp_path / "never").exists()


@pytest.fixture(scope="module")
def base():
    return Base()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_peft_makes_again(base, tmp_path, init):
    """PEFT's own file read and written: the same bytes, and PEFT loads what it had."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    base.saved(tmp_path / "theirs", init)
    adapter = jl.io.load_peft(tmp_path / "theirs", NAMES, base.params, layout="in_out")
    jl.io.save_peft(tmp_path / "ours", adapter, NAMES, params=base.params)
    assert config(tmp_path / "ours")["init_lora_weights"] == init
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (
        tmp_path / "theirs" / WEIGHTS
    ).read_bytes()
    back = jl.io.load_peft(tmp_path / "ours", NAMES, base.params, layout="in_out")
    chex.assert_trees_all_equal(adapter, back)
    again = peft.PeftModel.from_pretrained(base.torch(), tmp_path / "ours")
    got = again(torch.tensor(base.x)).detach().numpy()
    assert error(small(jl.merge(base.params, adapter), base.x), got) <= 1e-5


def test_pissa_of_ours_in_peft(base, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    adapter = trained(small, base.params, (base.x,), {"w.": methods.PiSSA(2, alpha=6.0)})
    jl.io.save_peft(tmp_path, adapter, NAMES, params=base.params)
    assert config(tmp_path)["init_lora_weights"] == "pissa"
    again = peft.PeftModel.from_pretrained(base.torch(), tmp_path)
    got = again(torch.tensor(base.x)).detach().numpy()
    assert error(small(jl.merge(base.params, adapter), base.x), got) <= 1e-5
    other = {k: w + 0.1 for k, w in base.params.items()}
    with pytest.raises(FormatError, match=r"w0.*from pissa's.*write jl\.inits\.fold"):
        jl.io.save_peft(tmp_path / "never", adapter, NAMES, params=other)
    with pytest.raises(FormatError, match=r"no place for PiSSA .give its weights as params"):
        jl.io.save_peft(tmp_path / "never", adapter, NAMES)


@pytest.mark.parametrize(("method", "way"), [
    (methods.BlockLoRA(2, 2.0, 2), r"jl\.merging\.to_lora\(adapter, params\)"),
    (methods.FlyLoRA(4, 2, 2), "no LoRA is equal"),
])  # fmt: skip
def test_a_refusal_names_what_can_be_done_instead(base, tmp_path, method, way):
    adapter = trained(small, base.params, (base.x,), {"w0": method})
    with pytest.raises(FormatError, match=f"no place for {type(method).__name__} .*{way}"):
        jl.io.save_peft(tmp_path, adapter, NAMES)
