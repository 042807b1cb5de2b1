"""The demo model: what its files are, and the text that it writes greedily."""

import json

import pytest
import torch
from conftest import DEMO

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
    return llama.load(DEMO)


@pytest.mark.parametrize("prompt_lookup", [0, 8])
@pytest.mark.parametrize("prompt", GOLDEN)
def test_greedy_text_is_the_golden_text(model, prompt, prompt_lookup):
    text = model.generate(prompt, 48, temperature=0, prompt_lookup=prompt_lookup)
    assert text == [GOLDEN[prompt]]


def test_the_files_are_a_checkpoint_in_metas_layout_and_fp16():
    state = torch.load(DEMO / "consolidated.00.pth", weights_only=True)
    assert {w.dtype for name, w in state.items() if name != "rope.freqs"} == {torch.float16}
    assert "rope.freqs" in state
    assert json.loads((DEMO / "params.json").read_text())["vocab_size"] == -1
    assert sum(path.stat().st_size for path in DEMO.glob("*.*")) < 6_000_000
