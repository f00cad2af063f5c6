r"""Trans-LoRA: adapters of MiniLM-L6 move to MiniLM-L3 with texts written from five rows of a task.

.. math::
    \mathrm{acc}(A'_t) \;\ge\; \max\bigl(\mathrm{acc}(A_t),\;
    \mathrm{acc}(\text{linear head of the target on the five rows})\bigr) - 2 \text{ points}

The record also has: the student with DoRA, unfiltered and random texts, what five rows give without
a transfer (LoRA trained on them), the target base without an adapter, how many texts the
discriminator took for real, and the seconds that writing took.

Deviates: the paper's targets are larger than their sources and generate text; here the target has
half of the source's layers (`trans_lora_larger` goes the other way) and both classify. The margin
was chosen before anything was measured.
"""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import numpy as np

import jlora as jl
from experiments.claims import text_transfer as lib
from experiments.claims import transfer_bases as bases
from experiments.claims import transfer_texts
from experiments.claims.protocol import Claim, Figures
from experiments.claims.text_transfer import Size
from experiments.data import minilm_l3
from experiments.workdir import read_json, write_json
from jlora.registry import code_sha256, shared_code

Accuracies = dict[str, tuple[float, ...]]  # by what was measured, per task


def measured(source: str, target: str, size: Size, seed: int, workdir: Path) -> Accuracies:
    """`compared`, once: the workdir keeps the figures that the present code gave."""
    code = shared_code("trans_lora", Path(__file__).parents[2]), code_sha256(Path(__file__))
    given = json.dumps([source, target, dataclasses.astuple(size), seed, code])
    tag = hashlib.sha256(given.encode()).hexdigest()[:12]
    path = workdir / "transferred" / f"{source}-{target}-{seed}-{tag}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write_json(path, compared(source, target, size, seed, workdir))
    kept = read_json(path, dict, "delete it, the adapters are then moved again")
    return {name: tuple(values) for name, values in kept.items()}


def compared(source: str, target: str, size: Size, seed: int, workdir: Path) -> Accuracies:
    """Test accuracy per task of everything that is compared, one seed."""
    handed = lib.owned(size, seed, workdir, source)
    texts = [part[1] for part in lib.parts(size, seed, workdir)]
    words = transfer_texts.vocabulary(minilm_l3.folder(workdir))
    number = len(texts[0])
    chance = [transfer_texts.random_texts(words, number, 10 * seed + t) for t in range(len(texts))]
    move = functools.partial(lib.moved, handed, size=size, seed=seed, workdir=workdir,
                             base=target)  # fmt: skip
    plain = bases.fresh(bases.side(target, workdir), bases.lora(), seed)
    filtered = move(texts, method=bases.lora())
    students = {
        "LoRA": filtered.adapter,
        "DoRA": move(texts, method=jl.DoRA(bases.RANK, alpha=float(bases.RANK))).adapter,
        "unfiltered": move(texts, method=bases.lora(), filtered=False).adapter,
        "random texts": move(chance, method=bases.lora()).adapter,
        "LoRA on five rows": lib.from_seeds(handed, size, seed, workdir, target),
        "target base": bases.repeated(plain),
    }  # fmt: skip
    head = lib.linear(handed, size, workdir, target)
    same = lib.checked(handed, lib.texts_of(size.written, workdir))
    result = {k: lib.accuracy(target, a, size, workdir) for k, a in students.items()}
    result["source"] = lib.accuracy(source, handed.adapters, size, workdir)
    result["linear head on five rows"] = head
    result["written texts that are training rows"] = (float(same),)
    result["share of written texts taken for real"] = tuple(
        (np.asarray(filtered.odds) > 0).mean(1).tolist()
    )
    return result


def figures(source: str, target: str, size: Size, seed: int, workdir: Path) -> Figures:
    """Per task: the student, the better of source and linear head, and random texts; one seed."""
    result = measured(source, target, size, seed, workdir)
    best = np.maximum(result["source"], result["linear head on five rows"])
    more = {k: float(np.mean(v)) for k, v in result.items()}
    more["seconds of writing"] = sum(w.seconds for w in lib.texts_of(size.written, workdir))
    names = tuple(t.name for t in bases.tasks())
    return Figures(names, result["LoRA"], tuple(best.tolist()), result["random texts"], more=more)


def claim(name: str, source: str, target: str) -> Claim:
    """The claim that nothing is lost from one base to the other.

    Args:
      name: of the claim file.
      source: the base that the adapters are of.
      target: the base that they move to.
    """
    return Claim(
        name=name,
        systems=("Trans-LoRA",),
        statement=f"accuracy of adapters of {source} moved to {target} with texts written from "
        "five rows > max(source adapter, linear head of the target on the five rows) - 2 points",
        reference="arXiv:2405.17258 (Llama-2 7B to 13B, BBH: source 43.3, target 37.9, moved 43.4)",
        baseline="the better of the source adapter and the linear head",
        control="texts of random words",
        unit="accuracy",
        assets=lib.ASSETS,
        run=functools.partial(figures, source, target, Size()),
        margin=-0.02,
    )


CLAIM = claim("trans_lora", bases.L6, bases.L3)
