"""From a jsonl line to packed rows: every token and weight by hand; refused lines are named."""

import json

import numpy as np
import pytest

from experiments.finetuning import batches, packing, records
from experiments.finetuning import chat as chats
from experiments.finetuning.chat import Document


def message(role, content):
    return {"role": role, "content": content}


def record(*messages, prompt="", completion=""):
    return records.Record("f:1", tuple(messages), prompt, completion)


def text(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(list(ids)))


def test_only_completions_of_a_chat_are_learned(tokenizer):
    turns = [message("user", "ab"), message("assistant", "c"), message("user", "d"),
             message("assistant", "ef")]  # fmt: skip
    found = chats.document(tokenizer, record(*turns))
    assert text(tokenizer, found.ids) == (
        "<|user|>ab<|end|><|assistant|>c<|end|><|user|>d<|end|><|assistant|>ef<|end|>"
    )
    assert text(tokenizer, found.ids[found.learned]) == "c<|end|>ef<|end|>"
    ids, expected = chats.prompt(tokenizer, record(*turns))
    assert text(tokenizer, ids).endswith("d<|end|><|assistant|>") and expected == "ef"


def test_a_pair_of_texts_ends_with_the_end_token_and_starts_as_the_tokenizer_says(make_tokenizer):
    pair = record(prompt="ab", completion="cd")
    found = chats.document(make_tokenizer(bos=True), pair)
    assert text(make_tokenizer(), found.ids) == "<|system|>abcd<|end|>"
    assert text(make_tokenizer(), found.ids[found.learned]) == "cd<|end|>"
    assert len(chats.document(make_tokenizer(), pair).ids) == 5


def test_a_token_that_reaches_over_the_border_is_learned():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merging = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "bc": 3, "E": 4}, [("b", "c")]))
    merging.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="E")
    found = chats.document(tokenizer, record(prompt="ab", completion="ca"))
    assert found.ids.tolist() == [0, 3, 0, 4] and found.learned.tolist() == [
        False,
        True,
        True,
        True,
    ]


def test_a_template_that_renders_turns_differently_later_is_refused(make_tokenizer):
    last_only = "{% for m in messages %}{{ loop.last }}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"f:1: messages\[1\]: the template renders"):
        turns = (message("user", "a"), message("assistant", "b"), message("user", "c"))
        chats.document(make_tokenizer(last_only), record(*turns))
    for template, said in (("{{ raise_exception('no') }}", "refuses"), (None, "chat_template")):
        with pytest.raises(ValueError, match=said):
            chats.document(make_tokenizer(template), record(message("assistant", "b")))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{oops", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ("[1]", "got list, expected an object"),
        ('{"prompt": "a"}', "completion: missing"),
        ('{"prompt": "a", "completion": ""}', "completion: got ''"),
        ('{"prompt": "a", "completion": 3}', "completion: got int"),
        ('{"text": "a"}', r"prompt: missing; got \['text'\]"),
        ('{"messages": []}', "expected a list of messages"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "got no completion"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\]"),
        ('{"messages": [], "prompt": "a"}', "expected one form"),
    ],
)
def test_the_first_bad_line_is_named(tmp_path, line, said):
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "id": 7}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=said) as error:
        records.read(path)
    assert "d.jsonl:3: " in str(error.value)


def test_files_without_examples_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        records.read(tmp_path / "none")
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(ValueError, match="got no examples"):
        records.read(tmp_path / "empty")


def documents(*lengths):
    return [
        Document(np.arange(n, dtype=np.int32) + 10 * k, np.ones(n, bool), f"f:{k}")
        for k, n in enumerate(lengths)
    ]


def test_packed_rows_hold_every_document_once():
    rows = packing.rows(documents(3, 5, 2, 4, 1), 8)
    assert rows.ids.shape == (2, 8)  # 15 tokens in 16 places
    seen = {}
    for ids, positions, segments in zip(rows.ids, rows.positions, rows.segments, strict=True):
        for segment in set(segments.tolist()) - {packing.PADDING}:
            here = segments == segment
            assert positions[here].tolist() == list(range(here.sum()))
            seen[int(ids[here][0]) // 10] = ids[here].tolist()
    assert seen == {k: d.ids.tolist() for k, d in enumerate(documents(3, 5, 2, 4, 1))}
    first = rows.positions == 0
    assert not rows.weights[first].any() and rows.weights.sum() == 15 - 5
    assert len(packing.rows(documents(3, 5, 2), 8, pack=False).ids) == 3


def test_a_document_longer_than_a_row_is_an_error_or_counted():
    with pytest.raises(ValueError, match=r"f:1: got 9 tokens, expected at most max_length=8"):
        packing.fit(documents(3, 9), 8, "error")
    kept, over = packing.fit(documents(3, 9), 8, "drop")
    assert [d.where for d in kept] == ["f:0"] and [d.where for d in over] == ["f:1"]
    with pytest.raises(ValueError, match="got 9 tokens"):
        packing.fit(documents(9), 8, "drop")


def test_batches_follow_from_the_step_and_every_pass_has_every_row():
    pytest.importorskip("grain", reason="grain is in the extra experiments")
    rows = packing.rows(documents(*range(2, 8)), 8, pack=False)
    data, again = batches.shuffled(rows, 2, 5), batches.shuffled(rows, 2, 5)
    order = np.concatenate([data[k].ids[:, 0] for k in range(6)])
    assert sorted(order[:6]) == sorted(order[6:]) == [0, 10, 20, 30, 40, 50]
    assert order[:6].tolist() != order[6:].tolist()
    np.testing.assert_array_equal(data[4].ids, again[4].ids)  # without reading those before
    assert any((batches.shuffled(rows, 2, 6)[k].ids != data[k].ids).any() for k in range(3))
    held_out = batches.in_order(rows, 4)
    assert [b.ids.shape for b in held_out] == [(4, 8)] * 2
    assert sum(b.weights.sum() for b in held_out) == rows.weights.sum()


def test_the_shipped_orders_are_what_their_rule_says():
    from experiments.finetuning import orders

    for part, count in (("train", 300), ("test", 40)):
        lines = (orders.DATA / f"orders_{part}.jsonl").read_text().splitlines()
        assert lines == orders.examples(part) and len(set(lines)) == count
    words = [json.loads(line)["messages"][0]["content"] for line in orders.examples("test")]
    assert not any(name in text for name in orders.NAMES["train"] for text in words)
