"""Settings of the Cond P-Diff experiment: one frozen dataclass, one absl flag per field.

Every field names the earliest stage that reads it. A stage's key is a hash of all fields read by
it or by a stage before it, so changing a sampler setting never retrains the zoo.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from experiments.data import user
from experiments.data.kind_presets import KIND_PLANS

STAGES = (
    "data",
    "zoo",
    "codec",
    "rivals",
    "denoiser",
    "sample",
    "evaluate",
    "more_steps",
    "episodes",
    "layered",
    "report",
)
TASKS = ("toy", "smoke", "quick", "full", "methods", "merging", "domains", "generation", "glue")
KINDS = tuple(f"{name}+kinds" for name in KIND_PLANS)
LAYOUT = 2  # of the stages' folders: raised when their files change, so that none is misread
BASES = ("minilm", "tiny", "hf")


RANGES: dict[str, Callable[[float], bool]] = {  # what an error message expects -> its test
    "> 0": lambda x: x > 0,
    ">= 0": lambda x: x >= 0,
    ">= 1": lambda x: x >= 1,
    ">= 2": lambda x: x >= 2,
    "0 <= x <= 1": lambda x: 0 <= x <= 1,
    "0 <= x < 1": lambda x: 0 <= x < 1,
    "1 <= x <= 1000": lambda x: 1 <= x <= 1000,
    "0 <= x < 2**31": lambda x: 0 <= x < 2**31,
}


def setting(
    stage: str, default: Any, help: str, choices: tuple[str, ...] = (), range: str = ""
) -> Any:
    """A dataclass field with the stage that reads it, its help text and its allowed values.

    Args:
      stage: earliest stage that reads it. default: the flag's default. help: the flag's help text.
      choices: allowed texts. range: key of `RANGES`; every number has one.
    """
    meta = {"stage": stage, "help": help, "choices": choices, "range": range}
    return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings; `key(stage)` hashes what a stage depends on."""

    # data: base model, tasks, conditions
    base: str = setting("data", "minilm", "minilm, tiny (random weights, for tests) or hf:DIR")
    tasks: str = setting(
        "data",
        "quick",
        "toy | smoke | quick | full | merging | glue | glue:DIR; toy, smoke, quick or full with"
        " +kinds adds tasks of several classes, of form and of pairs, and the level unseen_kind",
    )
    task_dir: str = setting(
        "data",
        "",
        "folder of the user's own tasks (2 to 20 classes, texts or pairs); they join the zoo",
    )
    max_length: int = setting("data", 32, "tokens kept of a text", range=">= 1")
    train_texts: int = setting("data", 250, "most training texts per class", range=">= 1")
    eval_rows: int = setting("data", 100, "test texts per task, half of each class", range=">= 2")
    layers: int = setting("data", 3, "how many upper layers carry adapters (0: all)", range=">= 0")
    head: str = setting(
        "data",
        "anonymous",
        "frozen head: fixed random class vectors, or embeddings of the label texts",
        ("anonymous", "label_text"),
    )
    head_scale: float = setting("data", 20.0, "logit scale of the frozen head", range="> 0")
    examples: int = setting(
        "data", 16, "K, example texts per class in a task's condition", range=">= 1"
    )
    data_seed: int = setting(
        "data", 0, "seed of sub-task choice, head and conditions", range="0 <= x < 2**31"
    )
    # zoo
    sites: str = setting("zoo", r"attention/(query|key|value|out)/kernel", "regex of adapted sites")
    rank: int = setting("zoo", 4, "LoRA rank", range=">= 1")
    alpha: float = setting("zoo", 4.0, "LoRA alpha; scale = alpha / rank", range="> 0")
    canonical: str = setting(
        "zoo",
        "frozen_A",
        "how the factors' gauge freedom is removed; frozen_A: one shared random A, B is trained",
        ("none", "balanced_svd", "procrustes", "frozen_A"),
    )
    zoo_seeds: int = setting(
        "zoo", 2, "training runs per seen task (a reference seed comes on top)", range=">= 1"
    )
    references: int = setting(
        "zoo", 24, "seen tasks that also get a reference seed (0: all)", range=">= 0"
    )
    zoo_steps: int = setting("zoo", 50, "optimiser steps per run", range=">= 1")
    zoo_batch: int = setting("zoo", 16, "texts per step and run", range=">= 1")
    zoo_lr: float = setting("zoo", 1e-2, "peak learning rate (Adam, cosine decay)", range="> 0")
    zoo_snapshots: int = setting(
        "zoo", 3, "spaced snapshots kept of the last third of a run", range=">= 1"
    )
    zoo_chunk: int = setting("zoo", 12, "runs trained at once (vmapped)", range=">= 1")
    zoo_segment: int = setting("zoo", 25, "steps between checkpoints", range=">= 1")
    # codec
    codec: str = setting("codec", "pca", "codec of the generator", ("pca", "token_ae", "conv_ae"))
    latent: int = setting("codec", 96, "latent numbers per token (pca, token_ae)", range=">= 1")
    codec_steps: int = setting("codec", 600, "training steps of an autoencoder codec", range=">= 1")
    pdiff_ae_steps: int = setting(
        "codec", 1500, "training steps of the paper's autoencoder", range=">= 1"
    )
    pdiff_ae_width: int = setting(
        "codec", 32, "decoder channels of the paper's autoencoder (256)", range=">= 1"
    )
    # denoiser
    objective: str = setting(
        "denoiser", "flow", "path and prediction of the generator", ("flow", "v", "eps")
    )
    width: int = setting("denoiser", 128, "DiT width", range=">= 1")
    depth: int = setting("denoiser", 4, "DiT blocks", range=">= 1")
    heads: int = setting("denoiser", 4, "DiT attention heads", range=">= 1")
    steps: int = setting("denoiser", 800, "diffusion training steps", range=">= 1")
    batch: int = setting("denoiser", 64, "adapters per diffusion step", range=">= 1")
    lr: float = setting("denoiser", 1e-3, "peak learning rate of the denoiser", range="> 0")
    ema: float = setting("denoiser", 0.995, "decay of the weight average", range="0 <= x < 1")
    cond_dropout: float = setting(
        "denoiser", 0.1, "share of conditions replaced by the null one", range="0 <= x <= 1"
    )
    cond_noise: float = setting(
        "denoiser", 0.0, "std of noise added to training conditions", range=">= 0"
    )
    prior: str = setting(
        "denoiser",
        "ridge",
        "mean of the prior the denoiser corrects: kernel ridge on the condition, or none",
        ("ridge", "none"),
    )
    dispersive: str = setting(
        "denoiser",
        "none",
        "Dispersive Loss on the block at depth//4",
        ("none", "infonce_l2", "infonce_cos", "hinge", "covariance"),
    )
    dispersive_weight: float = setting(
        "denoiser", 0.5, "weight of the Dispersive Loss", range=">= 0"
    )
    task_steps: int = setting(
        "denoiser", 450, "steps with the task loss through the decoder", range=">= 0"
    )
    task_batch: int = setting("denoiser", 16, "tasks per task-loss step", range=">= 1")
    task_rows: int = setting("denoiser", 8, "texts per task in a task-loss step", range=">= 1")
    task_lr: float = setting(
        "denoiser", 1.5e-3, "peak learning rate of the task-loss phase", range="> 0"
    )
    task_flow_weight: float = setting(
        "denoiser", 0.02, "weight of the diffusion loss in that phase", range=">= 0"
    )
    task_pool: str = setting(
        "denoiser",
        "pairs",
        "tasks of the task loss: every allowed ordered pair of seen labels, or the zoo's tasks",
        ("pairs", "zoo"),
    )
    pdiff_steps: int = setting("denoiser", 300, "training steps of the paper's DDPM", range=">= 1")
    pdiff_width: int = setting(
        "denoiser", 8, "first of the U-Net's widths w,2w,4w,8w (64)", range=">= 1"
    )
    pdiff_batch: int = setting("denoiser", 32, "batch of the paper's DDPM", range=">= 1")
    # sample
    sampler: str = setting(
        "sample", "euler", "sampler of the generator", ("euler", "heun", "ddim", "ddpm")
    )
    sample_steps: int = setting("sample", 20, "sampler steps", range=">= 1")
    guidance: float = setting(
        "sample", 1.0, "classifier-free guidance scale (1: conditional)", range=">= 0"
    )
    samples: int = setting("sample", 10, "samples per task", range=">= 1")
    pdiff_sample_steps: int = setting(
        "sample", 250, "ancestral steps of the paper's DDPM (1000)", range="1 <= x <= 1000"
    )
    step_grid: str = setting("sample", "2,5,20", "sampler steps of the step curve")
    ddpm_grid: str = setting("sample", "20,1000", "ancestral steps of the same curve")
    step_tasks: int = setting("sample", 8, "seen tasks used for the step curve", range=">= 1")
    more_steps: str = setting(
        "more_steps",
        "5,20,50",
        "further steps of training on held-out tasks from a generated, mean and zero start"
        " ('': not measured)",
    )
    full_steps: int = setting(
        "more_steps",
        50,
        "steps of full fine-tuning of the adapted layers on held-out tasks (0: not measured)",
        range=">= 0",
    )
    # episodes
    episode_steps: int = setting(
        "episodes",
        160,
        "steps of training a shared adapter in episodes (0: closed form on the base alone)",
        range=">= 0",
    )
    episode_tasks: int = setting("episodes", 2, "tasks per step", range=">= 1")
    episode_rank: int = setting("episodes", 8, "rank of the shared adapter", range=">= 1")
    episode_lr: float = setting(
        "episodes", 2e-3, "peak learning rate of the shared adapter", range="> 0"
    )
    seed: int = setting("zoo", 0, "seed of everything trained or sampled", range="0 <= x < 2**31")

    def key(self, stage: str) -> str:
        """Ten hex digits over every field read up to `stage`."""
        upto = STAGES[: STAGES.index(stage) + 1]
        fields = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.metadata["stage"] in upto
        }
        fields["layout"] = LAYOUT
        blob = json.dumps(fields, sort_keys=True).encode()
        return hashlib.sha256(blob).hexdigest()[:10]


def define_flags(settings: type = Config) -> None:
    """Define one absl flag for every field of a dataclass of settings."""
    kinds: dict[str, Any] = {
        "bool": flags.DEFINE_bool,
        "int": flags.DEFINE_integer,
        "float": flags.DEFINE_float,
        "str": flags.DEFINE_string,
    }
    for f in dataclasses.fields(settings):
        text = f"[{f.metadata['stage']}] {f.metadata['help']}"
        if f.metadata["choices"]:
            flags.DEFINE_enum(f.name, str(f.default), list(f.metadata["choices"]), text)
        else:
            kinds[str(f.type)](f.name, f.default, text)


def from_flags(values: flags.FlagValues) -> Config:
    """Read the flags into a `Config`. Raises ValueError on values that cannot work."""
    fields: dict[str, Any] = {f.name: values[f.name].value for f in dataclasses.fields(Config)}
    config = Config(**fields)
    check(config)
    return config


def check_fields(config: Any) -> None:
    """Raise ValueError "name: got X, expected Y" for the first setting outside its range.

    Args:
      config: of any dataclass whose fields are all `setting`s.
    """
    for field in dataclasses.fields(config):
        value, meta = getattr(config, field.name), field.metadata
        expected = meta["range"]
        if expected and not (math.isfinite(value) and RANGES[expected](value)):
            raise wrong(field.name, value, expected)
        if meta["choices"] and value not in meta["choices"]:
            raise wrong(field.name, value, f"one of {', '.join(meta['choices'])}")


def check(config: Config) -> None:
    """Raise ValueError "name: got X, expected Y" for the first setting that cannot work."""
    check_fields(config)
    if config.width % config.heads:
        raise wrong("width", config.width, f"a multiple of heads={config.heads}")
    if config.tasks.split(":")[0] not in TASKS + KINDS:
        known = f"one of {', '.join(TASKS)} or glue:DIR; {', '.join(KINDS)}"
        raise wrong("tasks", config.tasks, known)
    if config.base.split(":")[0] not in BASES:
        raise wrong("base", config.base, "minilm, tiny or hf:DIR")
    if config.sampler in ("euler", "heun") and config.objective != "flow":
        raise wrong("objective", config.objective, f"flow, which sampler={config.sampler} needs")
    for name in ("step_grid", "ddpm_grid", "more_steps"):
        parts = [part.strip() for part in getattr(config, name).split(",")]
        if name == "more_steps" and parts == [""]:
            continue
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise wrong(name, getattr(config, name), "positive integers joined by commas")
    if config.objective == "eps" and config.task_steps:
        raise wrong(
            "task_steps", config.task_steps, "0: objective=eps says nothing of the data in noise"
        )
    try:
        re.compile(config.sites)
    except re.error as error:
        raise wrong("sites", config.sites, f"a regular expression ({error})") from error


def check_folders(config: Config) -> None:
    """Find a bad --task_dir, GLUE folder or base folder before any stage is opened.

    Raises:
      ValueError: a folder that is not there, or a task folder that is not as it must be.
    """
    for name, prefix in (("tasks", "glue:"), ("base", "hf:")):
        value = getattr(config, name)
        if value.startswith(prefix) and not Path(value.removeprefix(prefix)).is_dir():
            raise wrong(name, value, f"{prefix}DIR with DIR a folder")
    if config.task_dir:
        user.tasks(config.task_dir)


def wrong(name: str, got: Any, expected: str) -> ValueError:
    """The error of a setting."""
    return ValueError(f"{name}: got {got!r}, expected {expected}")
