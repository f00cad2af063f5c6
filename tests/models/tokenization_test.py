"""Fixed-length token arrays from a tiny WordPiece vocabulary."""

import numpy as np
import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import models, normalizers, pre_tokenizers, processors

from jlora.models.encoder import tokenizer
from jlora.models.tokenization import Tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "film", "bad", "##ly"]


def _fast(words=WORDS):
    fast = Fast(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer(lowercase=True)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    # A stored setting that encode_batch must replace.
    fast.enable_padding(length=3, direction="left")
    return fast


@pytest.fixture
def tiny(tmp_path):
    _fast().save(str(tmp_path / "tokenizer.json"))
    return tokenizer(tmp_path)


def test_padding_and_truncation_keep_the_special_tokens(tiny):
    ids, mask = tiny.encode_batch(["Good film", "badly unknown", ""], 5)
    np.testing.assert_array_equal(ids, [[2, 4, 5, 3, 0], [2, 6, 7, 1, 3], [2, 3, 0, 0, 0]])
    np.testing.assert_array_equal(mask, ids != 0)
    assert ids.dtype == np.int32 and mask.dtype == bool
    ids, mask = tiny.encode_batch(["good film bad film good"], 4)
    np.testing.assert_array_equal(ids, [[2, 4, 5, 3]])
    assert mask.all()


def test_length_is_an_argument_not_a_state(tiny):
    first = tiny.encode_batch(["good film"], 5)
    tiny.encode_batch(["good film"], 3)
    again = tiny.encode_batch(["good film"], 5)
    np.testing.assert_array_equal(first[0], again[0])
    empty = tiny.encode_batch([], 5)
    assert empty[0].shape == empty[1].shape == (0, 5)
    assert (tiny.vocab, tiny.pad_id) == (8, 0)


def test_of_a_pair_the_longer_text_is_cut_first(tiny):
    long = "good film bad film good"
    ids, mask = tiny.encode_pairs([(long, "bad"), ("bad", long), ("good", "bad")], 6)
    np.testing.assert_array_equal(ids, [[2, 4, 5, 3, 6, 3], [2, 6, 3, 4, 5, 3], [2, 4, 3, 6, 3, 0]])
    np.testing.assert_array_equal(mask, ids != 0)
    single, _ = tiny.encode_batch([f"{long} [SEP] bad"], 6)  # mutation: the second is lost
    assert 6 not in single[0, 4:]
    with pytest.raises(ValueError, match="length: got 4, expected >= 5 for a pair of texts"):
        tiny.encode_pairs([("good", "bad")], 4)


def test_errors(tiny, tmp_path):
    with pytest.raises(ValueError, match="length: got 2, expected more than 2 special tokens"):
        tiny.encode_batch(["good"], 2)
    with pytest.raises(TypeError, match="got one str"):
        tiny.encode_batch("good", 5)
    with pytest.raises(TypeError, match=r"texts\[1\]: got tuple, expected str"):
        tiny.encode_batch(["good", ("good", "film")], 5)
    with pytest.raises(FileNotFoundError, match=r"nowhere/tokenizer\.json"):
        tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="padding token '<pad>' is not in the vocabulary"):
        Tokenizer(_fast(), pad="<pad>")
