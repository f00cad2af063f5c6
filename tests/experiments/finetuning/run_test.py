"""A whole run on a tiny Llama: it learns, PEFT reads the result, what cannot be is refused."""

import dataclasses
import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.finetuning import adapter as adapters
from experiments.finetuning import run, train
from experiments.finetuning.settings import check
from experiments.workdir import StageError
from jlora import methods
from jlora.io import safetensors_file
from jlora.models import decoder

pytest.importorskip("grain", reason="grain is in the extra experiments")


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """(report, workdir) of a whole run in this process."""
    check(settings)
    workdir = tmp_path_factory.mktemp("finished")
    plan = run.plan(settings)
    return run.run(plan, workdir), workdir, plan


def test_the_loss_falls_and_the_report_says_so(finished):
    report, workdir, _ = finished
    losses = report["losses"]
    assert len(losses) == 30 and np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    sides = (16 + 32) + 2 * (16 + 16) + (32 + 16) + 3 * (16 + 32)  # q, k and v, out, ffn
    assert report["trained"] == 2 * 2 * sides
    before, after = report["before"]["answers"], report["after"]["answers"]
    assert [a["expected"] for a in after] == ["mmm", "nnn"]
    assert before != after and report["before"]["loss"] != report["after"]["loss"]
    text = "\n".join(run.lines(report, workdir))
    assert f"held-out loss: {report['before']['loss']:.4f} before" in text and "peft" in text
    assert sorted(p.name for p in workdir.rglob("step-*")) == ["step-000020", "step-000030"]
    assert list(workdir.rglob("events.*")), "TensorBoard"


def test_peft_has_the_same_logits(finished, tiny):
    torch = pytest.importorskip("torch", reason="torch is a test-only requirement (Python 3.11)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import transformers

        _, workdir, _ = finished
        raw = json.loads((workdir / "peft" / "adapter_config.json").read_text())
        assert raw["base_model_name_or_path"] == str(tiny) and raw["task_type"] == "CAUSAL_LM"
        base = transformers.AutoModelForCausalLM.from_pretrained(raw["base_model_name_or_path"])
        model = peft.PeftModel.from_pretrained(base, workdir / "peft").eval()
    config, params = decoder.load(tiny)
    adapter = jl.io.restore_adapter(workdir / "orbax")
    ids = np.random.default_rng(0).integers(0, 33, (2, 9)).astype(np.int32)
    tuned = jl.lift(lambda p, x: decoder.forward(p, x, config=config).logits)
    ours = np.asarray(tuned(params, adapter, jnp.asarray(ids)))
    with torch.no_grad():
        theirs = model(torch.tensor(ids).long()).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    plain = np.asarray(decoder.forward(params, jnp.asarray(ids), config=config).logits)
    assert np.abs(plain - ours).max() > 1e-2 * np.abs(theirs).max()


def test_an_adapter_to_continue_from_must_be_of_this_base(finished, settings):
    _, workdir, plan = finished
    params = plan.base.read()
    like = adapters.fresh(jax.random.key(9), params, plan.base.config, settings)
    for name in ("peft", "orbax"):
        s = dataclasses.replace(settings, start=str(workdir / name))
        found = adapters.continued(like, params, plan.base.name, s)
        want = jl.io.restore_adapter(workdir / "orbax")
        b = "layers/ffn/up/kernel"
        np.testing.assert_array_equal(found.trainable[b]["b"], want.trainable[b]["b"])
        wide = adapters.fresh(
            jax.random.key(9), params, plan.base.config, dataclasses.replace(s, rank=3)
        )
        with pytest.raises(ValueError, match=r"got .*expected"):
            adapters.continued(wide, params, plan.base.name, s)
    s = dataclasses.replace(settings, start=str(workdir / "peft"))
    with pytest.raises(ValueError, match=r"expected 'other': an adapter of another base"):
        adapters.continued(like, params, "other", s)


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    from experiments.finetuning.step import Report, State

    class Bar:
        step = curve = staticmethod(lambda *args, **kwargs: None)

    def step(state, number):
        value = jnp.float32(np.nan if number == 4 else number)
        return (
            State(state.step + 1, {"a": state.trainable["a"] + 1}, (), state.losses),
            Report(value, jnp.float32(1), jnp.isfinite(value)),
        )

    state = State(jnp.int32(0), {"a": jnp.zeros(2)}, (), jnp.zeros(6))
    keep = lambda state: train.save(tmp_path, state)  # noqa: E731
    with pytest.raises(FloatingPointError, match=r"step 5: got loss nan .*step-000004"):
        train.train(state, step, 6, keep, tmp_path, 2, Bar())
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    again = train.resume(tmp_path, state, place)
    assert int(again.step) == 4 and again.trainable["a"].tolist() == [4, 4]
    with pytest.raises(StageError, match=r"step-000004: .*a: expected shape \(3,\)"):
        train.resume(tmp_path, state._replace(trainable={"a": jnp.zeros(3)}), place)


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({}, jl.LoRA(2, alpha=4.0)),
        ({"method": "decomposed(lora)"}, methods.Decomposed(jl.LoRA(2, alpha=4.0))),
        (
            {"method": "Decomposed(LoHa)", "method_args": '{"Decomposed": {"by": "in"}}'},
            methods.Decomposed(methods.LoHa(2, alpha=4.0), by="in"),
        ),
        (
            {"method": "Decomposed(Residual(LoRA))", "method_args": '{"dropout": 0.5}'},
            methods.Decomposed(methods.Residual(jl.LoRA(2, alpha=4.0, dropout=0.5))),
        ),
    ],
)
def test_a_method_is_named_with_its_wrappers(settings, change, want):
    assert adapters.method(dataclasses.replace(settings, **change)) == want


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "LoRR"}, r"got 'LoRR', expected one of ALLoRA, .*LoRA.*; or a METHOD of them "
         r"in Decomposed\(METHOD\), .*Residual\(METHOD\)"),
        ({"method": "Residual"}, "got 'Residual', expected one of ALLoRA"),
        ({"method": "LoRA(LoRA)"}, r"got 'LoRA\(LoRA\)'"),
        ({"method": "Residual(LoRA"}, r"got 'Residual\(LoRA'"),
        ({"method": "Residual(LoRA)", "method_args": '{"Residual": {"by": "in"}}'},
         r"expected Residual: a JSON object of \[\]"),
        ({"method": "Decomposed(LoRA)", "method_args": '{"by": "in"}'},
         r"expected LoRA: a JSON object of \['dropout', .*'Decomposed'\]"),
        ({"method": "Residual(IA3)", "rank": 0, "alpha": 0.0},
         "Residual: expected a method with factors"),
        ({"method": "HRA"}, "alpha: got 4.0, expected 0: HRA has"),
    ],
)  # fmt: skip
def test_a_method_that_is_none_is_refused(settings, change, said):
    with pytest.raises(ValueError, match=said):
        adapters.method(dataclasses.replace(settings, **change))


def test_what_a_step_cannot_train_is_refused_before_it_starts(settings):
    for name in ("TokenMask", "MixLoRA"):
        s = dataclasses.replace(settings, method=f"{name}(LoRA)")
        with pytest.raises(ValueError, match=rf"method: {name}\(.*: {name}: "):
            run.plan(s)


def test_a_frozen_copy_is_a_buffer_of_its_own(settings):
    """Trained arrays are donated to the step, which reads the frozen ones too."""
    s = dataclasses.replace(settings, method="Residual(LoRA)", targets=".*query/kernel")
    config, params = decoder.load(s.base)
    leaves = jax.tree.leaves(adapters.fresh(jax.random.key(0), params, config, s))
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves) == 5


def test_the_memory_of_a_wrapped_method_is_stated(settings):
    plain, wrapped = (
        run.dry(run.plan(dataclasses.replace(settings, method=name, max_length=12, batch=2)))
        for name in ("LoRA", "Decomposed(LoRA)")
    )
    count = [
        int(re.search(r"([\d,]+) trained", x[0])[1].replace(",", "")) for x in (plain, wrapped)
    ]
    outputs = 2 * (32 + 2 * 16 + 16 + 2 * 32 + 16)  # a length per column, of two layers
    assert count[1] - count[0] == outputs
    assert "memory per device" in wrapped[2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": "nowhere"}, "base: got nowhere"),
        ({"data": "nowhere"}, "nowhere: cannot be read"),
        ({"max_length": 65}, "max_length: got 65, expected at most 64, the context"),
        ({"max_length": 8}, "train.jsonl:1: got 12 tokens, expected at most max_length=8"),
        ({"sample_tokens": 60}, "sample_tokens: got 60 after a prompt of 8 tokens"),
        ({"tensor": 16}, "fsdp x tensor: got 1 x 16"),
        ({"optimizer_args": "{"}, "optimizer_args: got '{', expected JSON"),
        ({"optimizer_args": '{"lr": 1}'}, "expected a JSON object of .*'b1', 'b2', 'eps'"),
        ({"optimizer": "lora_fa", "optimizer_args": '{"damping": 0}'}, "lora_fa: damping: got 0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(settings, change, said):
    with pytest.raises(ValueError, match=said):
        run.plan(dataclasses.replace(settings, **change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": ""}, "base: got '', expected a path"),
        ({"quantize": 3}, "quantize: got 3, expected 0, 4 or 8"),
        ({"batch": 3}, "batch: got 3, expected a multiple of accumulate x fsdp = 2"),
        ({"targets": "("}, "targets: got '\\(', expected a regular expression"),
        ({"lr": float("nan")}, "lr: got nan, expected > 0"),
        ({"dtype": "float16"}, "dtype: got 'float16'"),
        ({"optimizer": "muon"}, "optimizer: got 'muon'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, change, said):
    with pytest.raises(ValueError, match=said):
        check(dataclasses.replace(settings, **change))


def test_a_base_that_does_not_fit_is_refused(settings, tiny, tmp_path, make_tokenizer):
    """Unknown architecture, tensors missing or surplus, a tokenizer of another model."""

    def copy(name, **fields):
        folder = tmp_path / name
        folder.mkdir()
        for path in tiny.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | fields))
        return dataclasses.replace(settings, base=str(folder)), folder

    s, _ = copy("mamba", model_type="mamba")
    with pytest.raises(ValueError, match="model_type: got 'mamba', expected one of"):
        run.plan(s)
    s, folder = copy("small", vocab_size=20)
    with pytest.raises(ValueError, match="tokenizer: got tokens up to 33, expected below 20"):
        run.plan(s)
    s, folder = copy("torn")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer: cannot be read"):
        run.plan(s)
    s, folder = copy("tensors")
    tensors, _ = safetensors_file.read(folder / "model.safetensors")
    tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
    safetensors_file.write(folder / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"missing tensors \['model.norm.weight'\], surplus .*model.extra.weight"
    ):
        run.plan(s).base.read()
