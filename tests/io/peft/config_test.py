"""PEFT's rules for targets and patterns, against PEFT's own functions where they are installed."""

import functools
import json
import time

import pytest

from jlora.io import FormatError
from jlora.io.peft import config as peft_config
from jlora.io.peft.tables import TABLES
from jlora.methods import KaSA, LoRA

LORA = next(table for table in TABLES if table.method is LoRA)
MODULES = [
    f"encoder.layer.{i}.{leaf}"
    for i in (0, 1, 11)
    for leaf in (
        "attention.self.query",
        "attention.self.key",
        "attention.output.dense",
        "output.dense",
    )
] + ["layers.0.mlp.experts.3.up", "query", "pooler.dense", "classifier.out_proj"]

CONFIGS = [
    {"target_modules": ["query", "dense"]},
    {"target_modules": ["output.dense"]},
    {
        "target_modules": ["self.query", "encoder.layer.1.attention.self.key"],
        "layers_to_transform": 0,
    },
    {"target_modules": ["query", "up"], "layers_to_transform": [0, 11]},
    {"target_modules": ["query", "up"], "layers_to_transform": [1], "layers_pattern": "layer"},
    {"target_modules": ["up"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["query"], "layers_to_transform": []},
    {"target_modules": r".*\.(query|key)"},
    {"target_modules": r"encoder\.layer\.1\..*|query", "exclude_modules": ["key", "query"]},
    {"target_modules": ["dense"], "exclude_modules": r".*\.1\..*"},
    {"target_modules": ["dense", "out_proj"], "modules_to_save": ["classifier", "pooler"]},
    {"target_modules": ["query"], "rank_pattern": {"layer.1.attention.self.query": 3, "query": 5}},
    {"target_modules": ["query"], "rank_pattern": {r"^query": 2}, "alpha_pattern": {".*1.*": 9}},
]


def reader(**config):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    return peft_config.Reader("adapter_config.json", config, LORA)


@pytest.mark.parametrize("config", CONFIGS)
def test_targets_and_patterns_are_pefts(config):
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    theirs = peft.LoraConfig(r=4, lora_alpha=8, **config)
    ours = reader(**config)
    hits = 0
    for module in MODULES:
        wanted = check_target_module_exists(theirs, module)
        wanted = bool(wanted) and type(wanted).__name__ != "_ExcludedModule"
        assert ours.targets(module) == wanted, module
        hits += wanted
        rank = theirs.rank_pattern.get(get_pattern_key(theirs.rank_pattern, module), theirs.r)
        alphas = theirs.alpha_pattern
        alpha = alphas.get(get_pattern_key(alphas, module), theirs.lora_alpha)
        got = ours.fields(module)
        assert (got["r"], got["lora_alpha"]) == (rank, alpha), module
    assert 0 < hits < len(MODULES)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"use_bdlora": {"x": 1}}, "use_bdlora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token"),
        ({"alora_invocation_tokens": [1]}, "alora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"invented_next_year": 0.5}, "invented_next_year"),
        ({"r": 2.5}, "r = 2.5"),
        ({"r": True}, "r = True"),
        ({"r": 10**12}, "r = 1000000000000"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"use_rslora": 1}, "use_rslora"),
        ({"rank_pattern": {"a": None}}, "rank_pattern"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"target_modules": [1]}, "target_modules"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform"),
        ({"peft_type": "LOHA"}, "peft_type"),
    ],
)
def test_what_cannot_be_represented_is_refused(change, why):
    with pytest.raises(FormatError, match=why):
        reader(**{"target_modules": ["query"], **change})


def test_unknown_fields_that_are_neutral_pass():
    assert reader(target_modules=["query"], new_flag=False, new_config=None).targets("query")


@pytest.mark.parametrize("bad", ["(", "a{2,1}", "(?P<n>", "[[a]"])
def test_bad_patterns_are_refused(bad):
    with pytest.raises(FormatError, match="bad pattern"):
        reader(target_modules=bad).targets("query")


def test_hostile_patterns_run_against_a_deadline(monkeypatch):
    monkeypatch.setattr(peft_config, "SECONDS", 0.2)
    hostile, text = r"(a|aa)+b\b.*c", "a" * 60 + "cbc"
    start = time.process_time()
    with pytest.raises(FormatError, match="takes too long"):
        reader(target_modules=hostile).targets(text)
    assert time.process_time() - start < 2
    monkeypatch.setattr(peft_config, "SECONDS", 0.5)  # it is the deadline that ended it
    with pytest.raises(FormatError, match="takes too long"):
        start = time.process_time()
        reader(target_modules=hostile).targets(text)
    assert time.process_time() - start > 0.3


def test_combine_gives_every_module_its_fields_and_round_trips():
    modules = {
        f"encoder.layer.{i}.attention.self.query": {
            "r": 2 + (i == 1),
            "lora_alpha": 4 if i else 6,
            "lora_dropout": 0.0,
            "use_rslora": False,
        }
        for i in range(3)
    }
    config = peft_config.combine("c", LORA, modules, {"task_type": "CAUSAL_LM"})
    again = json.loads(peft_config.to_bytes(config))
    ours = peft_config.Reader("c", again, LORA)
    assert {m: ours.fields(m) for m in modules} == modules
    assert config["r"] == 2 and config["lora_alpha"] == 4 and config["task_type"] == "CAUSAL_LM"
    assert config["rank_pattern"] == {"encoder.layer.1.attention.self.query": 3}
    known = {m: ("site", (i,)) for i, m in enumerate(modules)}
    assert peft_config.absent(ours, known, modules) == []
    assert peft_config.absent(ours, known, list(modules)[1:]) == list(modules)[:1]
    every = reader(target_modules="all-linear")
    head = {"lm_head": ("head", ())}
    assert peft_config.absent(every, known | head, list(modules)[1:]) == list(modules)[:1]


def test_combine_refuses_what_peft_has_no_pattern_for():
    fields = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "use_rslora": False}
    with pytest.raises(FormatError, match="one use_rslora for all modules"):
        peft_config.combine("c", LORA, {"a": fields, "b": fields | {"use_rslora": True}}, {})
    with pytest.raises(FormatError, match="cannot tell"):  # 'x.a' ends in '.a'
        peft_config.combine("c", LORA, {"x.a": fields, "y.a": fields, "a": fields | {"r": 1}}, {})


def test_the_written_config_has_exactly_pefts_fields():
    peft = pytest.importorskip("peft")
    kinds = {
        "LORA": peft.LoraConfig,
        "HIRA": peft.HiraConfig,
        "LOHA": peft.LoHaConfig,
        "LOKR": peft.LoKrConfig,
        "VERA": peft.VeraConfig,
        "OFT": peft.OFTConfig,
        "BOFT": peft.BOFTConfig,
        "ADALORA": functools.partial(peft.AdaLoraConfig, total_step=1),
        "IA3": peft.IA3Config,
        "LN_TUNING": peft.LNTuningConfig,
    }
    # the forms of other types need fields of their modules: real PEFT loads them in types_test
    for table in [t for t in TABLES if t.type in kinds and t.method is not KaSA]:
        told = {"feedforward_modules": True} if table.type == "IA3" else dict(table.fields)
        fields, more = table.settle({"a.q": told})
        ours = peft_config.combine("c", table, fields, more)
        theirs = kinds[table.type]().to_dict()
        assert set(ours) == set(theirs), table.type
