"""A tiny Llama with a tokenizer and a template of its own, and a few examples to learn."""

import json

import jax
import pytest

from experiments.finetuning.settings import Settings
from jlora.models import decoder

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
LETTERS = "abcdefghijklmnopqrstuvwxyz .?="
CONFIG = decoder.DecoderConfig(
    "llama", vocab=40, layers=2, width=16, heads=4, kv_heads=2, head_width=8, ffn=32,
    max_positions=64, tied=True, init_std=0.2,
)  # fmt: skip


def letters(template=TEMPLATE, bos=False):
    """One token per letter: what is learned can be counted by hand."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: n for n, token in enumerate([*SPECIAL, *LETTERS])}
    fast = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        fast.post_processor = processors.TemplateProcessing(
            single="<|system|> $A", special_tokens=[("<|system|>", vocab["<|system|>"])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token="<|end|>", unk_token="?",
        bos_token="<|system|>" if bos else None, extra_special_tokens=SPECIAL[1:3],
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def chat(*texts):
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": t} for n, t in enumerate(texts)]}


@pytest.fixture(scope="session")
def tokenizer():
    return letters()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A checkpoint directory."""
    folder = tmp_path_factory.mktemp("tiny")
    decoder.save(folder, CONFIG, decoder.init(jax.random.key(0), CONFIG))
    letters().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """(training examples, held-out ones): the answer repeats the letter that was asked for."""
    folder, paths = tmp_path_factory.mktemp("data"), []
    for name, part in (("train", "abcdefghijkl"), ("test", "mno")):
        lines = [json.dumps(chat(f"say {x}", x * 3)) for x in part]
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_text("\n".join(lines) + "\n")
    return tuple(paths)


@pytest.fixture(scope="session")
def make_tokenizer():
    return letters


@pytest.fixture(scope="session")
def settings(tiny, data):
    return Settings(
        base=str(tiny), data=str(data[0]), eval_data=str(data[1]), max_length=32, batch=4,
        accumulate=2, steps=30, lr=3e-2, save_every=10, samples=2, sample_tokens=4, rank=2,
        alpha=4.0,
    )  # fmt: skip
