"""The generator loop: batches, lengths, ends."""

import pytest
import torch
from conftest import PARAMS, TOKENIZER

import llama

PROMPTS = [
    "Once upon a time",
    "a",
    "",
    "One day, a little fox named Stella wandered through the forest near her village, and then",
    "Once upon a time",
    "The end. " * 40,
]


@pytest.fixture(scope="module")
def model(checkpoint) -> llama.LLaMA:
    return llama.load(checkpoint, TOKENIZER)


def end_after(model: llama.LLaMA, monkeypatch: pytest.MonkeyPatch, text: str, n: int) -> None:
    """Let the n-th token that greedily follows the text be the end-of-sequence token."""
    tokens = model.tokenizer.encode(text, bos=True, eos=False)
    context = model.context(tokens, n)
    sampling = llama.generation.Sampling(n, temperature=0)
    new = [step[0] for step in model.extend([context], sampling, torch.Generator())]
    assert new[-1] not in new[:-1]
    monkeypatch.setattr(model.tokenizer, "eos_id", new[-1])


def test_a_batch_of_unequal_prompts_gives_each_what_it_gets_alone(model):
    alone = [model.generate([prompt], 20, temperature=0)[0] for prompt in PROMPTS]
    assert model.generate(PROMPTS, 20, temperature=0) == alone
    assert len(set(alone)) == len(set(PROMPTS))


def test_more_prompts_than_max_batch_size_run_in_several_batches(checkpoint, model):
    small = llama.load(checkpoint, TOKENIZER, max_batch_size=2)
    sizes = []
    advance = small.advance
    small.advance = lambda contexts: sizes.append(len(contexts)) or advance(contexts)
    assert small.generate(PROMPTS, 5, temperature=0) == model.generate(PROMPTS, 5, temperature=0)
    assert max(sizes) == 2


def test_greedy_text_is_the_most_probable_token_each_time(model):
    tokens = model.tokenizer.encode("Once upon a time", bos=True, eos=False)
    for _ in range(10):
        logits = model.model(torch.tensor([tokens]), 0)
        tokens.append(logits.argmax(-1).item())
    assert model.generate(["Once upon a time"], 10, temperature=0) == [
        model.tokenizer.decode(tokens)
    ]


def test_a_sequence_ends_before_its_end_of_sequence_token(model, monkeypatch):
    (long,) = model.generate([PROMPTS[0]], 10, temperature=0)
    end_after(model, monkeypatch, PROMPTS[0], 6)
    (text,) = model.generate([PROMPTS[0]], 10, temperature=0)
    assert long.startswith(text)
    assert text == model.generate([PROMPTS[0]], 5, temperature=0)[0]


def test_generation_stops_once_every_prompt_has_ended(model, monkeypatch):
    end_after(model, monkeypatch, PROMPTS[0], 6)
    model.generate([PROMPTS[0]] * 2, 10, temperature=0)
    assert model.timings.new_tokens == 2 * 5


def test_the_context_bounds_prompt_and_continuation_together(checkpoint):
    model = llama.load(checkpoint, TOKENIZER, max_seq_len=24)
    prompt = "Once upon a time"
    n_prompt = len(model.tokenizer.encode(prompt, bos=True, eos=False))
    context = model.context(model.tokenizer.encode(prompt, bos=True, eos=False), 100)
    sampling = llama.generation.Sampling(100, temperature=0)
    assert len(list(model.extend([context], sampling, torch.Generator()))) == 24 - n_prompt
    assert context.cache.values.shape[2] == 64  # one block


def test_a_prompt_as_long_as_the_context_is_refused_with_both_lengths(checkpoint):
    model = llama.load(checkpoint, TOKENIZER, max_seq_len=8)
    with pytest.raises(llama.UserError, match=r"\d+ tokens .* 8: .*--max_seq_len"):
        model.generate(["Once upon a time there was a fox in a forest"], 5)


def test_a_long_prompt_is_prefilled_in_pieces_to_the_same_text(model, monkeypatch):
    prompt = "The fox and the rabbit. " * 30
    (expected,) = model.generate([prompt], 10, temperature=0)
    monkeypatch.setattr("llama.generation.PREFILL_TOKENS", 50)
    assert model.generate([prompt], 10, temperature=0) == [expected]


def test_each_sequences_cache_is_as_long_as_it_may_become(model):
    args = model.model.args
    cache = model.context(range(10), 100).cache
    head_dim = PARAMS["dim"] // PARAMS["n_heads"]
    assert cache.values.shape == (args.n_layers, args.n_heads, 2 * 64, head_dim)
    assert cache.keys.numel() == cache.values.numel()


def test_a_seed_reproduces_and_another_does_not(model):
    def draw(seed: int) -> list[str]:
        return model.generate(PROMPTS[:2], 20, temperature=1.0, top_p=1.0, seed=seed)

    assert draw(1) == draw(1) != draw(2)
