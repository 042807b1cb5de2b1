"""The tokenizer: text to ids and back, at once and in pieces."""

import random

import pytest
from conftest import TOKENIZER
from sentencepiece import SentencePieceProcessor

import llama

SP = SentencePieceProcessor(model_file=str(TOKENIZER))
ADDED = {"<|im_start|>": 2048, "<|im_end|>": 2049, "<|im": 2050}
TEXTS = [
    "Hello, world!  Two spaces,\n\na blank line, and a tab\t.",
    "déjà vu, naïve, ça va, Ünïcödé",
    "emoji 🙂🚀 and 👨‍👩‍👧, 漢字, العربية",
    " a space in front",
    "",
    "<s>special tokens</s> as text",
]
PLAIN = llama.Tokenizer(TOKENIZER)
EXTENDED = llama.Tokenizer(TOKENIZER, ADDED, eos_ids=[2049])


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_sentencepiece_and_their_pieces_join_to_the_text(text):
    for each in (PLAIN, EXTENDED):
        ids = each.encode(text, bos=True, eos=True)
        assert ids == [1, *SP.encode(text), 2]
        assert "".join(each.decode_stream(ids)) == each.decode(ids[1:-1]) == text


def test_pieces_of_any_ids_join_to_what_sentencepiece_decodes():
    rng = random.Random(0)
    ordinary = range(PLAIN.n_words)
    byte_ids = [i for i in ordinary if SP.is_byte(i)]
    special = [PLAIN.bos_id, PLAIN.eos_id, 0, *SP.encode(" ")]
    for _ in range(3000):
        kinds = rng.choices([ordinary, byte_ids, special], k=rng.randrange(12))
        ids = [rng.choice(kind) for kind in kinds]
        assert "".join(PLAIN.decode_stream(ids)) == SP.decode(ids), ids


def test_a_character_of_several_tokens_appears_when_it_is_complete():
    ids = PLAIN.encode("a🙂b", bos=False, eos=False)
    assert [*filter(None, PLAIN.decode_stream(ids))] == ["a", "🙂", "b"]
    assert set(PLAIN.decode(ids[:-2])[1:]) == {"\ufffd"}  # it never is


def test_within_a_text_no_space_is_added_and_none_is_lost():
    ids = PLAIN.encode("hello there", bos=False, eos=False)
    assert "".join(PLAIN.decode_stream(ids, within=True)) == " hello there"
    for text in ("hello", " hello", "\n\nhello"):
        ids = PLAIN.encode(text, bos=False, eos=False, within=True)
        assert "".join(PLAIN.decode_stream(ids, within=True)) == text


@pytest.mark.parametrize("text", ["a <|im_end|> b\n", "<|im_start|>c<|im|>🙂<|im_start|>  c"])
def test_added_tokens_are_single_ids_both_ways(text):
    ids = EXTENDED.encode(text, bos=True, eos=False)
    rest = text
    for added, token in ADDED.items():  # the longer ones first
        assert ids.count(token) == rest.count(added)
        rest = rest.replace(added, "")
    assert EXTENDED.decode(ids) == text
