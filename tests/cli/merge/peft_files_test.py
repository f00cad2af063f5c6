"""What the real PEFT writes alongside factors, and of groups, through the command and on torch."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

import jlora as jl
from jlora.cli.merge import main as command
from jlora.cli.merge.base import Base
from jlora.cli.merge.config import PLAIN
from jlora.io import safetensors_file

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Of transformers, about itself; PEFT's own warnings stay errors.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

BASE = Path(__file__).parents[3] / "third_party/peft/llama/base"
HEAD, TABLE = "lm_head", "model.embed_tokens"
TOKENS = [[0, 3, 31, 1, 1, 7]]


def merged(tmp_path, model, *flags, base=BASE, form="merged", weight=1.0):
    """(status, target) of one adapter times a weight."""
    config = {
        "merge_method": "concat",
        "models": [{"model": str(model), "parameters": {"weight": weight}}],
        "out": {"path": f"out_{form}", "format": form},
        **({"base_model": str(base)} if base else {}),
    }
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(config))
    argv = ["--config", str(tmp_path / "merge.yaml"), "--overwrite", *flags]
    return command.main(argv), tmp_path / f"out_{form}"


def noisy(model, config, folder, std=0.3):
    """`model` with an adapter of noise, also written to `folder`."""
    torch.manual_seed(1)
    made = peft.get_peft_model(model, config)
    for p in made.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=std)
    made.save_pretrained(folder)
    return made.eval()


def llama(folder=BASE):
    return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def error(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.fixture
def language(tmp_path):
    """An adapter of the table and the head of a Llama: PEFT writes both weights into its file."""
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"])
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model = noisy(llama(), config, tmp_path / "lora")
    tensors, _ = safetensors_file.read(tmp_path / "lora/adapter_model.safetensors")
    for name in (HEAD, TABLE):
        assert f"base_model.model.{name}.base_layer.weight" in tensors
    return logits(model)


def test_a_table_and_a_head_with_their_weights_beside_them(language, tmp_path):
    """Merged weights load in transformers, the written adapter in PEFT, with the same logits."""
    assert error(logits(llama()), language) > 0.1
    status, out = merged(tmp_path, tmp_path / "lora")
    assert status == 0 and error(logits(llama(out)), language) <= 1e-5
    status, out = merged(tmp_path, tmp_path / "lora", form="peft")
    assert status == 0
    assert error(logits(peft.PeftModel.from_pretrained(llama(), out)), language) <= 1e-5
    status, out = merged(tmp_path, tmp_path / "lora", weight=0.9)
    assert error(logits(llama(out)), language) > 1e-3


def test_the_library_tells_of_the_weights_beside_them(language, tmp_path):
    params = Base(BASE).params({TABLE})
    with pytest.raises(jl.io.FormatError, match="replaces weights of the base model"):
        jl.io.load_peft(tmp_path / "lora", PLAIN, params)
    adapter = jl.io.load_peft(tmp_path / "lora", PLAIN, params, extras="leave")
    assert {s.path: s.ops for s, _ in adapter.sites}[f"{TABLE}/embedding"] == ("gather",)
    assert set(jl.io.peft_extras(tmp_path / "lora")) == {f"{HEAD}.weight", f"{TABLE}.weight"}


def test_weights_beside_it_that_are_not_the_bases_are_refused(language, tmp_path, capsys):
    assert merged(tmp_path, tmp_path / "lora", base=None, form="peft")[0] == 2
    said = capsys.readouterr().err
    assert "has the base's" in said and "a base is needed to see that it is unchanged" in said
    shutil.copytree(BASE, tmp_path / "other")
    tensors, meta = safetensors_file.read(BASE / "model.safetensors")
    tensors[f"{TABLE}.weight"][3, 4] += 1e-3
    safetensors_file.write(tmp_path / "other/model.safetensors", tensors, meta)
    status, out = merged(tmp_path, tmp_path / "lora", base=tmp_path / "other")
    assert status == 2 and not out.exists()
    assert f"{TABLE}.weight is not that of" in capsys.readouterr().err


def test_tables_that_are_heads_as_well_go_to_peft_only(tmp_path, capsys):
    """transformers would tie the head of the merged model to the changed table."""
    model = llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    assert json.loads((tmp_path / "tied/config.json").read_text())["tie_word_embeddings"] is True
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"])
    with pytest.warns(UserWarning, match="save_embedding_layers|tie_word_embeddings"):
        want = logits(noisy(model, config, tmp_path / "lora"))
    status, out = merged(tmp_path, tmp_path / "lora", base=tmp_path / "tied")
    assert status == 2 and not out.exists()
    assert "got tie_word_embeddings true" in capsys.readouterr().err
    status, out = merged(tmp_path, tmp_path / "lora", base=tmp_path / "tied", form="peft")
    assert status == 0
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        again = peft.PeftModel.from_pretrained(llama(tmp_path / "tied"), out)
    assert error(logits(again), want) <= 1e-5


class Groups(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(6, 4, (2, 3), groups=2)

    def forward(self, x):
        return self.conv(x)


@pytest.fixture
def groups(tmp_path):
    torch.manual_seed(0)
    net = Groups().eval()
    state = {k: v.numpy() for k, v in net.state_dict().items()}
    (tmp_path / "base").mkdir()
    safetensors_file.write(tmp_path / "base/model.safetensors", state, {"format": "pt"})
    return net


@pytest.mark.parametrize("base", [True, False])
def test_peft_lora_of_a_grouped_convolution_is_refused(base, groups, tmp_path, capsys):
    """PEFT does not merge it either: its delta reaches over the groups."""
    config = peft.LoraConfig(r=4, target_modules=["conv"])
    with pytest.warns(UserWarning, match="Merging is not supported"):
        model = noisy(copy.deepcopy(groups), config, tmp_path / "lora")
    with pytest.raises(NotImplementedError, match="groups > 1"):
        model.merge_and_unload()
    form, folder = ("merged", tmp_path / "base") if base else ("peft", None)
    status, out = merged(tmp_path, tmp_path / "lora", base=folder, form=form)
    assert status == 2 and not out.exists()
    said = capsys.readouterr().err
    assert "conv: got lora_B.weight (4, 2, 1, 1), expected (4, 4, 1, 1)" in said and "group" in said


def test_loha_of_a_grouped_convolution_is_merged(groups, tmp_path):
    config = peft.LoHaConfig(r=2, alpha=3, target_modules=["conv"])
    model = noisy(copy.deepcopy(groups), config, tmp_path / "loha")
    want = model.merge_and_unload().conv.weight.detach().numpy()
    old = groups.conv.weight.detach().numpy()
    assert error(old, want) > 0.1
    status, out = merged(tmp_path, tmp_path / "loha", base=tmp_path / "base")
    assert status == 0
    tensors, _ = safetensors_file.read(out / "model.safetensors")
    assert error(tensors["conv.weight"], want) <= 1e-5
    net = Groups()
    net.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()})
