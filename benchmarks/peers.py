"""torch and PEFT as peers: the model of ``encoder.py``, read from the files that jlora writes.

Adapters go over as PEFT directories, so that both stacks compute the same function; ``agree``
checks that they do before anything is timed. Attention is torch's fused kernel (``sdpa``), dropout
is off, the optimizer is torch's Adam.

Reference: the public interfaces. Deviates: nothing.
"""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from peft import PeftModel
from transformers import BertModel
from transformers.utils import logging

import jlora as jl
from benchmarks import encoder

logging.disable_progress_bar()
logging.set_verbosity_error()


def model(base: encoder.Base, threads: int) -> BertModel:
    """The frozen encoder, without pooler and dropout."""
    torch.set_num_threads(threads)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = BertModel.from_pretrained(
        base.folder, add_pooling_layer=False, attn_implementation="sdpa", **off
    )
    return bert.requires_grad_(False).eval()


def peft(base: encoder.Base, adapters: Sequence[Any], threads: int, train: bool = True) -> Any:
    """The encoder with adapters named a0, a1, ... that jlora wrote."""
    names = jl.io.bert()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k, adapter in enumerate(adapters):
            jl.io.save_peft(Path(folder) / f"a{k}", adapter, names)
        wrapped = PeftModel.from_pretrained(
            model(base, threads), f"{folder}/a0", adapter_name="a0", is_trainable=train
        )
        for k in range(1, len(adapters)):
            wrapped.load_adapter(f"{folder}/a{k}", adapter_name=f"a{k}", is_trainable=train)
    return wrapped.train(train)


def batch(batch: encoder.Batch) -> tuple[torch.Tensor, ...]:
    """ids, mask, labels as torch wants them."""
    return tuple(torch.tensor(np.asarray(x)).long() for x in batch)


def trainer(model: Any, head: Any, name: str = "a0") -> Callable[[tuple], torch.Tensor]:
    """A training step of adapter `name` and a head of its own: batch -> loss."""
    model.set_adapter(name)
    classifier = torch.nn.Linear(head["w"].shape[0], head["w"].shape[1])
    with torch.no_grad():
        classifier.weight.copy_(torch.tensor(np.asarray(head["w"]).T))
        classifier.bias.copy_(torch.tensor(np.asarray(head["b"])))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam([*trained, *classifier.parameters()], lr=encoder.RATE)

    def step(batch):
        ids, mask, labels = batch
        optimizer.zero_grad(set_to_none=True)
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = (hidden * mask[..., None].to(hidden.dtype)).sum(1)
        logits = classifier(torch.nn.functional.normalize(pooled, dim=-1))
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def agree(ours: Callable[[], Any], theirs: Callable[[], Any], steps: int = 3) -> float:
    """Runs both trainings; the largest relative difference of their losses.

    Raises RuntimeError where it is above 1e-3: the two would not be the same computation.
    """
    worst = 0.0
    for _ in range(steps):
        a, b = float(jax.device_get(ours())), float(theirs())
        worst = max(worst, abs(a - b) / abs(b))
    if not worst < 1e-3:
        raise RuntimeError(f"losses of the two stacks differ by {worst:.2e}, expected < 1e-3")
    return worst


def alike(ours: Any, theirs: torch.Tensor, mask: Any) -> None:
    """Raises RuntimeError where hidden states of unmasked tokens differ by more than 1e-3."""
    difference = np.abs(np.asarray(ours) - theirs.numpy())[np.asarray(mask)].max()
    if not difference < 1e-3:
        raise RuntimeError(f"hidden states differ by {difference:.2e}, expected < 1e-3")
