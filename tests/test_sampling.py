"""Sampling against transformers' logits processors and the written definitions."""

import math

import pytest
import torch
import transformers

import llama
from llama import Sampling
from llama.sampling import sample

N_DRAWS = 20000
LOGITS = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 2
SEEN = [3, 7, 7, 30, int(LOGITS.argmax())]


def frequencies(logits: torch.Tensor, **options) -> torch.Tensor:
    """How often each token is drawn."""
    uniforms = torch.rand(N_DRAWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = logits.expand(N_DRAWS, -1)
    tokens = sample(rows, [SEEN] * N_DRAWS, uniforms, Sampling(1, **options))
    return tokens.bincount(minlength=len(logits)) / N_DRAWS


def expected(logits: torch.Tensor, **options) -> torch.Tensor:
    """transformers' probabilities, its processors in its order."""
    rows = logits[None].clone()
    if "repetition_penalty" in options:
        penalty = transformers.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"])
        rows = penalty(torch.tensor([SEEN]), rows)
    rows = transformers.TemperatureLogitsWarper(options.get("temperature", 0.8))(None, rows)
    if "top_k" in options:
        rows = transformers.TopKLogitsWarper(options["top_k"])(None, rows)
    return transformers.TopPLogitsWarper(options.get("top_p", 0.95))(None, rows)[0].softmax(-1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 30.0, "top_p": 1.0},  # nearly flat: more than 256 tokens
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


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_least_and_the_largest_random_number_draw_a_token_of_the_nucleus(uniform):
    nucleus = expected(LOGITS, top_p=0.5).nonzero().flatten().tolist()
    uniforms = torch.tensor([uniform], dtype=torch.float64)
    assert sample(LOGITS[None], [[]], uniforms, Sampling(1, top_p=0.5)).item() in nucleus


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 1e-30}, {"top_k": 1}, {"top_p": 0}]
)
def test_these_options_leave_the_most_probable_token_alone(options):
    assert frequencies(LOGITS, **options)[LOGITS.argmax()] == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(bad):
    logits = torch.tensor([[0.0, bad, 1.0]])
    for temperature in (0, 1.0):
        with pytest.raises(llama.UserError, match="not finite"):
            sample(logits, [[]], torch.zeros(1), Sampling(1, temperature=temperature))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.inf, math.nan, "hot"]),
        ("top_p", [-0.1, 1.1, math.nan]),
        ("top_k", [-1, True]),
        ("repetition_penalty", [0, -1, math.inf, 1e39, 1e-40]),
        ("max_gen_len", [-1, 2.5]),
        ("seed", [2**64, "1"]),
        ("prompt_lookup", [-1, 65]),
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_refused_by_its_name(name, values):
    for value in values:
        with pytest.raises(llama.UserError, match=f"^`{name}` must be "):
            Sampling(**{"max_gen_len": 1, name: value})
