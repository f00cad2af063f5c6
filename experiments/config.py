"""Settings of the Cond P-Diff experiment: one frozen dataclass, one absl flag a field.

Every field names the earliest stage that reads it. A stage's key is a hash of all fields read by
it or by a stage before it, so changing a sampler setting never retrains the zoo.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from absl import flags

STAGES = ("data", "zoo", "codec", "denoiser", "sample", "evaluate", "report")


def setting(stage: str, default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with the stage that reads it, its help text and allowed values."""
    meta = {"stage": stage, "help": help, "choices": choices}
    return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings; `key(stage)` hashes what a stage depends on."""

    # data: base model, tasks, conditions
    base: str = setting("data", "minilm", "minilm, tiny (random weights, for tests) or hf:DIR")
    tasks: str = setting("data", "quick", "toy | smoke | quick | full | merging | glue | glue:DIR")
    task_dir: str = setting("data", "", "folder of the user's own tasks; they join the zoo")
    max_length: int = setting("data", 32, "tokens kept of a text")
    train_texts: int = setting("data", 250, "most training texts a class")
    eval_rows: int = setting("data", 100, "test rows a task, half of each class")
    layers: int = setting("data", 3, "how many upper layers carry adapters (0: all)")
    head: str = setting(
        "data",
        "anonymous",
        "frozen head: fixed random class vectors, or embeddings of the label texts",
        ("anonymous", "label_text"),
    )
    head_scale: float = setting("data", 20.0, "logit scale of the frozen head")
    examples: int = setting("data", 16, "K, example inputs a class in a task's condition")
    data_seed: int = setting("data", 0, "seed of sub-task choice, head and conditions")
    # zoo
    sites: str = setting("zoo", r"attention/(query|key|value|out)/kernel", "regex of adapted sites")
    rank: int = setting("zoo", 4, "LoRA rank")
    alpha: float = setting("zoo", 4.0, "LoRA alpha; scale = alpha / rank")
    canonical: str = setting(
        "zoo",
        "frozen_A",
        "how the factor gauge is removed; frozen_A: one shared random A, only B is trained",
        ("none", "balanced_svd", "procrustes", "frozen_A"),
    )
    zoo_seeds: int = setting("zoo", 2, "training runs a seen task (a reference seed comes on top)")
    references: int = setting("zoo", 24, "seen tasks that also get a reference seed (0: all)")
    zoo_steps: int = setting("zoo", 50, "optimiser steps a run")
    zoo_batch: int = setting("zoo", 16, "rows a step and run")
    zoo_lr: float = setting("zoo", 1e-2, "peak learning rate (Adam, cosine decay)")
    zoo_snapshots: int = setting("zoo", 3, "spaced snapshots kept of the last third of a run")
    zoo_chunk: int = setting("zoo", 12, "runs trained at once (vmapped)")
    zoo_segment: int = setting("zoo", 25, "steps between checkpoints")
    # codec
    codec: str = setting("codec", "pca", "codec of our generator", ("pca", "token_ae", "conv_ae"))
    latent: int = setting("codec", 96, "latent numbers a token (pca, token_ae)")
    codec_steps: int = setting("codec", 600, "training steps of an autoencoder codec")
    pdiff_ae_steps: int = setting("codec", 1500, "training steps of the paper's autoencoder")
    pdiff_ae_width: int = setting("codec", 32, "decoder channels of the paper's autoencoder (256)")
    # denoiser
    objective: str = setting(
        "denoiser", "flow", "path and prediction of our denoiser", ("flow", "v", "eps")
    )
    width: int = setting("denoiser", 128, "DiT width")
    depth: int = setting("denoiser", 4, "DiT blocks")
    heads: int = setting("denoiser", 4, "DiT attention heads")
    steps: int = setting("denoiser", 800, "diffusion training steps")
    batch: int = setting("denoiser", 64, "adapters a diffusion step")
    lr: float = setting("denoiser", 1e-3, "peak learning rate of the denoiser")
    ema: float = setting("denoiser", 0.995, "decay of the weight average")
    cond_dropout: float = setting("denoiser", 0.1, "share of conditions replaced by the null one")
    cond_noise: float = setting("denoiser", 0.0, "std of noise added to training conditions")
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
    dispersive_weight: float = setting("denoiser", 0.5, "weight of the Dispersive Loss")
    task_steps: int = setting("denoiser", 450, "steps with the task loss through the decoder")
    task_batch: int = setting("denoiser", 16, "tasks a task-loss step")
    task_rows: int = setting("denoiser", 8, "rows a task and task-loss step")
    task_lr: float = setting("denoiser", 1.5e-3, "peak learning rate of the task-loss phase")
    task_flow_weight: float = setting("denoiser", 0.02, "weight of the diffusion loss beside it")
    task_pool: str = setting(
        "denoiser",
        "pairs",
        "tasks of the task loss: every allowed ordered pair of seen labels, or the zoo's tasks",
        ("pairs", "zoo"),
    )
    pdiff_steps: int = setting("denoiser", 300, "training steps of the paper's DDPM")
    pdiff_width: int = setting("denoiser", 8, "first of the U-Net's widths w,2w,4w,8w (64)")
    pdiff_batch: int = setting("denoiser", 32, "batch of the paper's DDPM")
    # sample
    sampler: str = setting(
        "sample", "euler", "sampler of our generator", ("euler", "heun", "ddim", "ddpm")
    )
    sample_steps: int = setting("sample", 20, "sampler steps")
    guidance: float = setting("sample", 1.0, "classifier-free guidance scale (1: conditional)")
    samples: int = setting("sample", 10, "samples a task")
    pdiff_sample_steps: int = setting("sample", 250, "ancestral steps of the paper's DDPM (1000)")
    step_grid: str = setting("sample", "2,5,20", "sampler steps of the step curve")
    ddpm_grid: str = setting("sample", "20,1000", "ancestral steps of the same curve")
    step_tasks: int = setting("sample", 8, "seen tasks used for the step curve")
    seed: int = setting("zoo", 0, "seed of everything trained or sampled")

    def key(self, stage: str) -> str:
        """Ten hex digits over every field read up to `stage`."""
        upto = STAGES[: STAGES.index(stage) + 1]
        fields = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.metadata["stage"] in upto
        }
        blob = json.dumps(fields, sort_keys=True).encode()
        return hashlib.sha256(blob).hexdigest()[:10]


def define_flags() -> None:
    """Define one absl flag for every field of `Config`."""
    kinds: dict[str, Any] = {
        "int": flags.DEFINE_integer,
        "float": flags.DEFINE_float,
        "str": flags.DEFINE_string,
    }
    for f in dataclasses.fields(Config):
        text = f"[{f.metadata['stage']}] {f.metadata['help']}"
        if f.metadata["choices"]:
            flags.DEFINE_enum(f.name, str(f.default), list(f.metadata["choices"]), text)
        else:
            kinds[str(f.type)](f.name, f.default, text)


def from_flags(values: flags.FlagValues) -> Config:
    """Read the flags into a `Config`. Raises ValueError on values that cannot work."""
    found: dict[str, Any] = {f.name: values[f.name].value for f in dataclasses.fields(Config)}
    config = Config(**found)
    check(config)
    return config


def check(config: Config) -> None:
    """Raise ValueError naming the flag, its value and what is expected."""
    positive = (
        "max_length examples rank zoo_seeds zoo_steps zoo_batch zoo_snapshots zoo_chunk "
        "zoo_segment latent width depth heads steps batch samples sample_steps eval_rows"
    )
    for name in positive.split():
        if getattr(config, name) < 1:
            raise ValueError(f"--{name}={getattr(config, name)}: expected at least 1")
    if config.width % config.heads:
        raise ValueError(f"--width={config.width} is not a multiple of --heads={config.heads}")
    known = ("toy", "smoke", "quick", "full", "merging", "glue")
    if config.tasks.split(":")[0] not in known:
        raise ValueError(f"--tasks={config.tasks}: expected one of {known} or glue:DIR")
    if config.base.split(":")[0] not in ("minilm", "tiny", "hf"):
        raise ValueError(f"--base={config.base}: expected minilm, tiny or hf:DIR")
    if config.sampler in ("euler", "heun") and config.objective != "flow":
        raise ValueError(
            f"--sampler={config.sampler} integrates a flow: expected --objective=flow,"
            f" got --objective={config.objective}"
        )
    for name in ("step_grid", "ddpm_grid"):
        if not all(p.strip().isdigit() and int(p) > 0 for p in getattr(config, name).split(",")):
            raise ValueError(
                f"--{name}={getattr(config, name)}: expected positive integers joined by commas"
            )
    if config.objective == "eps" and (config.task_steps or config.sampler == "euler"):
        raise ValueError(
            "--objective=eps says nothing of the data at pure noise: expected --task_steps=0, got"
            f" {config.task_steps}"
        )
