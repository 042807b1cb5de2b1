"""The demo model: what its files are, and the text that it writes greedily."""

import json

import pytest
import torch
from conftest import DEMO, TOKENIZER

import llama

GOLDEN = {
    "Once upon a time": (
        "Once upon a time, there was a little girl named Mary who loved to draw and paint. She had"
        " a special place in her backyard where she could draw and paint, and her room was filled"
        " with all sorts of wonderful things.\nOne day,"
    ),
    "User: Tell me a story about a fox.\nAI:": (
        "User: Tell me a story about a fox.\nAI: Once upon a time, there was a little girl named"
        " Amy. She loved playing outside and exploring the world around her. One day, while"
        " playing outside, she stumbled upon a mysterious flyer that had been hidden behind a"
        " bush.\n"
    ),
}


@pytest.fixture(scope="module")
def model() -> llama.LLaMA:
    return llama.load(DEMO, TOKENIZER)


@pytest.mark.parametrize("prompt", GOLDEN)
def test_greedy_text_is_the_golden_text(model, prompt):
    assert model.generate([prompt], 48, temperature=0) == [GOLDEN[prompt]]


@pytest.mark.parametrize("prompt", ["I believe the meaning of life is", "Once upon a time"])
def test_greedy_text_does_not_fall_into_a_loop(model, prompt):
    words = model.generate([prompt], 256, temperature=0)[0].split()
    runs = [tuple(words[i : i + 6]) for i in range(len(words) - 5)]
    assert len(set(runs)) > 0.95 * len(runs)


def test_the_files_are_a_checkpoint_of_metas_in_fp16():
    state = torch.load(DEMO / "consolidated.00.pth", weights_only=True)
    assert {w.dtype for name, w in state.items() if name != "rope.freqs"} == {torch.float16}
    assert "rope.freqs" in state
    assert json.loads((DEMO / "params.json").read_text())["vocab_size"] == -1
    assert sum(path.stat().st_size for path in DEMO.glob("*.*")) < 6_000_000


def test_the_tokenizer_has_the_options_of_llamas():
    tokenizer = llama.Tokenizer(TOKENIZER)
    sp = tokenizer.sp_model
    assert (sp.unk_id(), tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, -1)
    assert sum(map(sp.is_byte, range(tokenizer.n_words))) == 256
    for text in ("two  spaces\n\n", "emoji 🙂", "1234", " leading"):
        assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text
    assert len(sp.encode("1234", out_type=str)) >= 4
