"""generate and stream: batches, lengths, ends, arguments."""

import pytest
import torch
from conftest import DEMO, PARAMS, ROOT, TOKENIZER, load
from peers import to_transformers

import llama

PROMPTS = [
    "Once upon a time",
    "a",
    "",
    "One day, a little fox named Stella wandered through the forest near her village, and then",
    "Once upon a time",
    "The end. " * 200,
]


@pytest.fixture(scope="module")
def model(checkpoint) -> llama.LLaMA:
    return load(checkpoint, max_seq_len=2048)


@pytest.fixture(scope="module")
def peer(weights):
    return to_transformers(weights, llama.ModelArgs(**PARAMS, max_seq_len=2048))


def greedy_ids(peer, tokens: list[int], n: int, **options: float) -> list[int]:
    """transformers' continuation."""
    options |= {"do_sample": False, "max_new_tokens": n, "min_new_tokens": n}
    return peer.generate(torch.tensor([tokens]), **options)[0, len(tokens) :].tolist()


@pytest.mark.parametrize("prompt_lookup", [0, 8])
def test_the_demo_tells_the_story_of_the_readme(prompt_lookup):
    model, options = load(DEMO), {"temperature": 0, "prompt_lookup": prompt_lookup}
    (story,) = model.generate("Once upon a time", 96, **options)
    assert len(story) > 300
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert " ".join(story.split()) in " ".join(readme.split())


@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS[3], "The fox and the rabbit. " * 200])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_text_is_that_of_transformers(model, peer, prompt, penalty):
    tokens = model.tokenizer.encode(prompt, bos=True, eos=False)
    expected = tokens + greedy_ids(peer, tokens, 20, repetition_penalty=penalty)
    text = model.generate(prompt, 20, temperature=0, repetition_penalty=penalty)
    assert text == [model.tokenizer.decode(expected)]


def test_a_batch_of_unequal_prompts_gives_each_what_it_gets_alone(model):
    options = {"max_gen_len": 20, "temperature": 0, "repetition_penalty": 1.1}
    alone = [model.generate(prompt, **options)[0] for prompt in PROMPTS]
    assert model.generate(PROMPTS, **options) == alone
    assert len(set(alone)) == len(set(PROMPTS))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_more_prompts_than_max_batch_size_run_in_several_batches(checkpoint, model, temperature):
    options = {"max_gen_len": 5, "temperature": temperature, "seed": 1, "prompt_lookup": 0}
    small = load(checkpoint, max_seq_len=2048, max_batch_size=2)
    sizes = []  # of forward passes
    small.model.tok_embeddings.register_forward_hook(lambda _, args, out: sizes.append(len(out)))
    assert small.generate(PROMPTS, **options) == model.generate(PROMPTS, **options)
    assert max(sizes) <= 520  # a prompt of 800 tokens is read in two passes
    assert [n for n in sizes if n < 3] == [2] * 4 * 3


def test_a_sequence_ends_before_a_token_of_eos_ids_and_the_batch_goes_on(model, peer):
    tokens = model.tokenizer.encode(PROMPTS[0], bos=True, eos=False)
    new = greedy_ids(peer, tokens, 6)
    assert new[5] not in new[:5]
    ended = llama.LLaMA(model.model, llama.Tokenizer(TOKENIZER, eos_ids=[new[5]]))
    alone = [ended.generate(prompt, 10, 0)[0] for prompt in (PROMPTS[3], PROMPTS[0])]
    assert alone[1] == ended.tokenizer.decode(tokens + new[:5])
    assert ended.timings.new_passes == 5  # beside that of the prompt: nothing after the end
    assert ended.generate([PROMPTS[3], PROMPTS[0]], 10, 0) == alone


def test_a_prompt_as_long_as_the_context_is_refused_with_both_lengths(checkpoint):
    model = load(checkpoint, max_seq_len=8)
    for run in (model.generate, model.stream):
        with pytest.raises(llama.UserError, match=r"\d+ tokens .* 8: .*`max_seq_len`"):
            run("Once upon a time there was a fox in a forest", 5)
        with pytest.raises(llama.UserError, match="8 tokens .* 8: .*`max_seq_len`"):
            model.stream([5] * 8, 5)


def test_a_seed_draws_the_same_text_again_and_another_seed_another(model):
    texts = [model.generate(["Once"] * 2, 20, seed=seed) for seed in (1, 1, 2, None, None)]
    assert texts[0] == texts[1]
    assert len({text for pair in texts for text in pair}) == 8


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 1}, {"seed": 2, "top_k": 5}])
@pytest.mark.parametrize("prompt", ["Once upon a time", "déjà vu 🙂", " a space, two  spaces", ""])
def test_the_stream_of_a_text_or_its_ids_joins_to_what_generate_returns(model, prompt, options):
    tokens = model.tokenizer.encode(prompt, bos=True, eos=False)
    (whole,) = model.generate(prompt, 20, **options)
    for given in (prompt, tokens, torch.tensor(tokens)):
        assert "".join(model.stream(given, 20, **options)) == whole


def test_the_stream_computes_no_more_than_is_asked_for(model):
    tokens = model.tokenizer.encode("Once upon a time", bos=True, eos=False)
    pieces = model.stream(tokens, 20, temperature=0, prompt_lookup=0)
    for _ in tokens:
        next(pieces)
    assert model.timings.prompt_tokens == 0  # the prompt is shown before it is computed
    next(pieces)
    next(pieces)
    assert (model.timings.prompt_tokens, model.timings.new_tokens) == (len(tokens), 1)


def test_prompts_that_are_neither_text_nor_ids_are_refused(model):
    for prompts in (5, None, [5], [None]):
        with pytest.raises(ValueError, match="`prompts?` must be"):
            model.generate(prompts, 3)
    for prompt in (5, None, [], ["Once"], [1, 2048], [1, -1], [1.5]):
        with pytest.raises(ValueError, match="`prompt` must be"):
            model.stream(prompt, 3)
