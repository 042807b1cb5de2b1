"""Text in pieces, as it comes."""

import random

import pytest
from conftest import TOKENIZER

import llama

TEXTS = [
    "Hello, world!  Two spaces,\n\na blank line, and a tab\t.",
    "déjà vu, naïve, ça va, Ünïcödé",
    "emoji 🙂🚀 and 👨‍👩‍👧, 漢字, العربية",
    " a space in front",
    "",
    "🙂",
]


@pytest.fixture(scope="module")
def tokenizer() -> llama.Tokenizer:
    return llama.Tokenizer(TOKENIZER)


@pytest.fixture(scope="module")
def model(checkpoint) -> llama.LLaMA:
    return llama.load(checkpoint, TOKENIZER, max_seq_len=64)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_a_text_join_to_it(tokenizer, text):
    for bos in (True, False):
        assert "".join(tokenizer.decode_stream(tokenizer.encode(text, bos=bos, eos=True))) == text


def test_pieces_of_any_ids_join_to_what_sentencepiece_decodes(tokenizer):
    rng = random.Random(0)
    ordinary = range(tokenizer.n_words)
    byte_ids = [i for i in ordinary if tokenizer.sp_model.is_byte(i)]
    special = [tokenizer.bos_id, tokenizer.eos_id, 0, *tokenizer.sp_model.encode(" ")]
    for _ in range(3000):
        kinds = rng.choices([ordinary, byte_ids, special], k=rng.randrange(12))
        ids = [rng.choice(kind) for kind in kinds]
        assert "".join(tokenizer.decode_stream(ids)) == tokenizer.sp_model.decode(ids), ids


def test_a_character_of_several_tokens_appears_when_it_is_whole(tokenizer):
    ids = tokenizer.encode("a🙂b", bos=False, eos=False)
    assert [*filter(None, tokenizer.decode_stream(ids))] == ["a", "🙂", "b"]


def test_a_final_incomplete_character_becomes_replacement_characters(tokenizer):
    ids = tokenizer.encode("a🙂", bos=False, eos=False)[:-1]
    *pieces, last = tokenizer.decode_stream(ids)
    assert "".join(pieces) == "a"
    assert set(last) == {"\ufffd"}


def test_within_a_text_the_first_space_stays(tokenizer):
    ids = tokenizer.encode("hello there", bos=False, eos=False)
    assert "".join(tokenizer.decode_stream(ids, within=True)) == " hello there"


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 1}, {"seed": 2, "top_k": 5}])
def test_the_stream_joins_to_what_generate_returns(model, options):
    for prompt in TEXTS[:3]:
        tokens = model.tokenizer.encode(prompt, bos=True, eos=False)
        (whole,) = model.generate([prompt], 20, **options)
        assert "".join(model.stream(tokens, 20, **options)) == whole


def test_the_stream_computes_no_more_than_is_asked_for(model):
    tokens = model.tokenizer.encode("Once upon a time", bos=True, eos=False)
    pieces = model.stream(tokens, 20, temperature=0)
    for _ in tokens:
        next(pieces)
    assert model.timings.prompt_tokens == 0  # the prompt is shown before it is computed
    next(pieces)
    next(pieces)
    assert model.timings.new_tokens == 1


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths(model):
    with pytest.raises(llama.UserError, match="100 tokens.* 64.*--max_seq_len"):
        model.stream([5] * 100, 20)
