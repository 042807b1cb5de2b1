"""Sampling against transformers' logits processors and the written definitions."""

import math

import pytest
import torch
from conftest import TOKENIZER
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import llama
from llama.generation import Sampling, penalize, sample

N_DRAWS = 20000
LOGITS = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 2
SEEN = [3, 7, 7, 30, int(LOGITS.argmax())]


def frequencies(logits: torch.Tensor, **options) -> torch.Tensor:
    """How often each token is drawn."""
    sampling = Sampling(1, seed=0, **options)
    rows = logits.expand(N_DRAWS, -1)
    tokens = sample(rows, [SEEN] * N_DRAWS, sampling, sampling.generator())
    return tokens.bincount(minlength=logits.shape[-1]) / N_DRAWS


def expected(logits: torch.Tensor, **options) -> torch.Tensor:
    """transformers' probabilities, its processors in its order."""
    processors = LogitsProcessorList()
    if "repetition_penalty" in options:
        processors.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    processors.append(TemperatureLogitsWarper(options.get("temperature", 0.8)))
    if "top_k" in options:
        processors.append(TopKLogitsWarper(options["top_k"]))
    processors.append(TopPLogitsWarper(options.get("top_p", 0.95)))
    return processors(torch.tensor([SEEN]), logits.clone())[0].softmax(-1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.5, "top_p": 1.0},
        {"top_p": 0.5},
        {"top_k": 3, "top_p": 1.0},
        {"top_k": 10, "top_p": 0.7, "temperature": 1.2},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7, "top_k": 20, "top_p": 0.9},
    ],
)
def test_tokens_are_drawn_with_the_probabilities_of_transformers(options):
    actual, probs = frequencies(LOGITS, **options), expected(LOGITS, **options)
    assert set(actual.nonzero().flatten().tolist()) <= set(probs.nonzero().flatten().tolist())
    deviation = (probs * (1 - probs) / N_DRAWS).sqrt()
    assert ((actual - probs).abs() <= 5 * deviation + 1e-3).all()


def test_the_penalty_is_that_of_transformers():
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    rows = torch.randn(2, 50, generator=torch.Generator().manual_seed(2))
    before = rows.clone()
    actual = penalize(rows, [SEEN, [1, 2]], 1.7)
    for row, tokens, row_before in zip(actual, [SEEN, [1, 2]], before):
        assert torch.equal(row, processor(torch.tensor([tokens]), row_before[None].clone())[0])
    assert torch.equal(rows, before)


def test_a_nucleus_beyond_the_256_most_probable_tokens_is_whole():
    flat = torch.zeros(1, 1000)
    assert (frequencies(flat, top_p=1.0) > 0).sum() == 1000


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 1}, {"top_p": 0}])
def test_the_most_probable_token_alone_is_left(options):
    assert frequencies(LOGITS, **options)[LOGITS.argmax()] == 1


@pytest.mark.parametrize(
    ("flag", "values"),
    {
        "temperature": [-0.1, math.inf, math.nan],
        "top_p": [-0.1, 1.1, math.nan],
        "top_k": [-1],
        "repetition_penalty": [0, -1, math.inf, 1e39, 1e-40],
        "max_gen_len": [-1],
        "seed": [2**64],
    }.items(),
)
def test_a_value_out_of_range_is_refused_with_its_flag(flag, values):
    for value in values:
        with pytest.raises(llama.UserError, match=f"^--{flag} takes "):
            Sampling(**{"max_gen_len": 1, flag: value})


def test_a_seed_draws_the_same_text_again_and_another_seed_another(checkpoint):
    model = llama.load(checkpoint, TOKENIZER)
    texts = [model.generate(["Once upon a time"], 20, seed=seed)[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_penalty_covers_the_prompt_and_what_is_generated(checkpoint):
    model = llama.load(checkpoint, TOKENIZER)
    tokens = model.tokenizer.encode("Once upon a time", bos=True, eos=False)
    context = model.context(tokens, 30)
    sampling = Sampling(30, temperature=0, repetition_penalty=1e9)
    for _ in model.extend([context], sampling, sampling.generator()):
        pass
    new = context.tokens[len(tokens) :]
    assert len(set(new)) == len(new) > 10
    assert not set(new) & set(tokens)
