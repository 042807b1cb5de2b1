"""Prompt lookup decoding: the same tokens, in fewer passes."""

from pathlib import Path

import pytest
import torch
from conftest import TOKENIZER, load, random_weights, write_shards

import llama
from llama.lookup import PromptLookup

PROMPTS = ["Once upon a time", "The cat", "a b c d e f g"]
GREEDY = {"temperature": 0}
SAMPLED = {"temperature": 0.9, "seed": 1}
PENALIZED = {"temperature": 0.8, "seed": 1, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random model that mostly goes round in cycles of 8 tokens."""
    weights = random_weights()
    for name in weights:
        if name.endswith(("wo.weight", "w2.weight")):
            weights[name] *= 0.1  # attention and feed-forward layers change little
    ids, embeddings = torch.arange(2048), weights["tok_embeddings.weight"].float()
    following = ids // 8 * 8 + (ids + 1) % 8
    weights["output.weight"][following] = torch.nn.functional.normalize(embeddings).half()
    return write_shards(tmp_path_factory.mktemp("cycles"), weights, 1)


@pytest.fixture(scope="module")
def model(folder) -> llama.LLaMA:
    return load(folder)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, PENALIZED, PENALIZED | GREEDY])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "batch"])
def test_the_text_is_the_same_with_guesses_and_without(model, prompts, options):
    plain = model.generate(prompts, 120, **options, prompt_lookup=0)
    assert model.timings.new_passes >= model.timings.new_tokens
    guessed = model.generate(prompts, 120, **options, prompt_lookup=16)
    assert model.timings.new_passes < 0.7 * model.timings.new_tokens
    assert guessed == plain


def test_guesses_do_not_lead_beyond_max_gen_len_or_the_context(folder, model):
    plain = [model.generate(PROMPTS[0], n, 0, prompt_lookup=0)[0] for n in range(70)]
    assert [model.generate(PROMPTS[0], n, 0, prompt_lookup=64)[0] for n in range(70)] == plain
    n_prompt = len(model.tokenizer.encode(PROMPTS[0], bos=True, eos=False))
    for n in (50, 53, 57):
        short = load(folder, max_seq_len=n_prompt + n)
        assert short.generate(PROMPTS[0], 100, 0, prompt_lookup=64) == [plain[n]]


@pytest.mark.parametrize("n", range(1, 5))
def test_an_end_of_sequence_token_among_the_guesses_ends_the_text(model, n):
    cycle = range(1600, 1608)
    ended = llama.LLaMA(model.model, llama.Tokenizer(TOKENIZER, eos_ids=[cycle[n]]))
    text = "".join(ended.stream([*cycle, *cycle], 40, temperature=0))
    assert text == ended.tokenizer.decode([*cycle, *cycle, *cycle[:n]])
    assert (ended.timings.prompt_tokens, ended.timings.new_tokens) == (16, 0)  # in the first pass


@pytest.mark.parametrize("options", [GREEDY, SAMPLED])
def test_a_chat_says_the_same_with_guesses_and_without(folder, options):
    model = load(folder, max_seq_len=128)  # so short that turns are evicted
    talks = []
    for prompt_lookup in (16, 0):
        sampling = llama.Sampling(50, **options, prompt_lookup=prompt_lookup)
        chat = llama.Chat(model, llama.STYLES["dialog"], "", sampling)
        messages = ["Tell me a story about a fox."] * 6
        talks.append([("".join(chat.reply(m)), list(chat.sequence.tokens)) for m in messages])
        assert "forgotten" in chat.status()
    assert talks[0] == talks[1]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8, 2, 3, 9, 1, 2, 3], [4, 5, 6, 7]),  # three tokens before two
        ([1, 2, 3, 4, 1, 2, 3, 5, 8, 1, 2, 3], [5, 8, 1, 2]),  # the last time
        ([1, 2, 3, 4, 1, 3], []),
    ],
)
def test_a_draft_is_what_followed_the_longest_most_recent_match(tokens, expected):
    lookup = PromptLookup(4)
    drafts = [lookup.draft(tokens[:n]) for n in (2, 3, 7, len(tokens))]  # as the context grows
    assert drafts[-1] == expected
    assert PromptLookup(0).draft(tokens) == []


def test_drafts_grow_after_success_and_stop_for_a_while_after_failure():
    lookup, tokens = PromptLookup(8), [*range(20), 0, 1, 2]
    assert len(lookup.draft(tokens)) == 4
    for n_drafted, n_accepted, expected in ((4, 3, 3), (3, 3, 6), (6, 6, 8)):
        lookup.adapt(n_drafted, n_accepted)
        assert len(lookup.draft(tokens)) == expected
    pauses = []
    for _ in range(8):
        lookup.adapt(2, 0)
        pauses.append(next(n for n in range(100) if lookup.draft(tokens)))
    assert pauses[0] > 0 and pauses == sorted(pauses)
