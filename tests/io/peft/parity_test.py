"""Files that we write, in the real PEFT on torch: its outputs are ours."""

import jax
import numpy as np
import pytest

import jlora as jl
from jlora.methods.decomposed import dora
from jlora.methods.kronecker import lokr
from jlora.methods.low_rank import adalora, hira, loha
from jlora.methods.orthogonal import boft, oft
from jlora.methods.selective import ia3
from jlora.methods.shared_basis import vera
from tests.io.shared import error, torch_model, torch_output, trained

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
METHODS = {
    "lora": jl.LoRA(rank=3, alpha=5.0),
    "rslora": jl.LoRA(rank=3, alpha=5.0, rslora=True),
    "adalora": adalora.AdaLoRA(rank=2, alpha=3.0),
    "boft": boft.BOFT(block=8),
    "dora": dora.DoRA(rank=2, alpha=3.0),
    "hira": hira.HiRA(rank=2),
    "loha": loha.LoHa(rank=2, alpha=3.0),
    "lokr": lokr.LoKr(rank=1, alpha=3.0, factor=2, decompose_both=True),
    "vera": vera.VeRA(rank=4),
    "oft": oft.OFT(block=4, terms=6),
    "oft_exact": oft.OFT(block=2, terms=None),
    "oft_shared": oft.OFT(block=8, share=True),
    "ia3": ia3.IA3(),
}


# Of transformers, about itself; PEFT's own warnings stay errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(autouse=True)
def no_cuda_kernel(monkeypatch):
    """PEFT would try to compile BOFT's kernel, and warn that there is no GPU."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)


@pytest.mark.parametrize("name", METHODS)
def test_peft_computes_what_we_do(golden, tmp_path, name):
    model = golden["llama"]
    pattern = "attention/query" if name in ("vera", "lokr") else "attention/(query|value)|ffn/up"
    adapter = trained(model.fn, model.params, model.args, {pattern: METHODS[name]})
    jl.io.save_peft(tmp_path, adapter, model.names, params=model.params)
    module = peft.PeftModel.from_pretrained(torch_model(model), tmp_path)
    ours = jax.jit(model.fn)(jl.merge(model.params, adapter), *model.args)
    assert error(ours, model.expected) > 1e-3
    assert error(ours, torch_output(module, model)) <= TOLERANCE
    module.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == (
        tmp_path / "adapter_model.safetensors"
    ).read_bytes()


def test_a_sequence_classifier_gets_its_prefix_and_its_head(golden, tmp_path):
    model = golden["bert"]
    names = model.names.replace(prefix="bert.")
    adapter = trained(
        model.fn,
        model.params,
        model.args,
        {"attention/(query|key|value|out)/kernel": jl.LoRA(rank=2)},
    )
    config = transformers.BertConfig.from_pretrained(model.path / "base", num_labels=2)
    module = transformers.BertForSequenceClassification(config)
    module.bert.load_state_dict(torch_model(model).state_dict(), strict=False)
    head = {
        "classifier.weight": np.linspace(-1, 1, 32, dtype=np.float32).reshape(2, 16),
        "classifier.bias": np.asarray([0.5, -0.5], np.float32),
    }
    jl.io.save_peft(tmp_path, adapter, names, task_type="SEQ_CLS", extras=head)
    loaded = peft.PeftModel.from_pretrained(module, tmp_path)
    state = loaded.state_dict()
    keys = [k for k in state if "classifier.modules_to_save.default" in k]
    assert len(keys) == 2
    for key in keys:
        np.testing.assert_array_equal(state[key], head[f"classifier.{key.rpartition('.')[2]}"])
    ours = jl.lift(model.fn)(model.params, adapter, *model.args)
    assert error(ours, torch_output(loaded.base_model.model.bert, model)) <= TOLERANCE


def test_an_adapter_of_the_upper_layers_lands_there(golden, tmp_path):
    model = golden["bert"]
    names = model.names.replace(layer_offset=2)
    whole = trained(model.fn, model.params, model.args, {"attention/query": jl.LoRA(rank=2)})
    last = jax.tree.map(lambda t: t[2:], whole)
    site, method = last.sites[0]
    cut = jl.Site(site.path, (1, *site.shape[1:]), site.kinds, site.dtype)
    jl.io.save_peft(tmp_path, last.replace(sites=((cut, method),)), names)
    module = peft.PeftModel.from_pretrained(torch_model(model), tmp_path)
    assert sum("lora_A" in key for key in module.state_dict()) == 1
    zero = jax.tree.map(lambda t: t.at[:2].set(0), whole.trainable)
    ours = jl.lift(model.fn)(model.params, whole.replace(trainable=zero), *model.args)
    assert error(ours, torch_output(module, model)) <= TOLERANCE


def test_lokr_splits_dimensions_as_peft_does():
    from peft.tuners.lokr.layer import factorization

    for dim in range(1, 130):
        for factor in [None, *range(1, dim + 3)]:
            theirs = factorization(dim, -1 if factor is None else factor)
            assert lokr.split(dim, factor) == theirs, (dim, factor)


def test_boft_deals_inputs_as_peft_does():
    from peft.tuners.boft.layer import BOFTLayer

    for block in (2, 4, 6):
        for stages in (2, 3, 4):
            size = 3 * block * 2 ** (stages - 1)
            for i in range(stages):
                theirs = BOFTLayer.block_butterfly_perm(
                    None, size, size // block // 2**i, block // 2, stages - 1
                )
                ours = boft.butterfly_permutation(size, block, i)
                np.testing.assert_array_equal(ours, theirs.numpy())


def test_every_type_of_peft_is_read_or_listed_with_the_reason():
    from jlora.io.peft.tables import TABLES
    from jlora.io.peft.types import OTHERS

    read = {table.type for table in TABLES}
    assert not read & set(OTHERS)
    assert read | set(OTHERS) == {kind.value for kind in peft.PeftType}
