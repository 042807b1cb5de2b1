"""The conversation: what is in its context, its cache and on the screen."""

import pytest
import torch
from conftest import TOKENIZER

import llama
import llama.generation
from llama.chat import STYLES, Chat, Style
from llama.generation import Sampling
from llama.model import apply_rotary_emb


def new_chat(model: llama.LLaMA, style: str | Style = "dialog", **options) -> Chat:
    style = STYLES[style] if isinstance(style, str) else style
    return Chat(
        model, style, options.pop("system", "Kind."), Sampling(**{"max_gen_len": 8, **options})
    )


@pytest.fixture(scope="module")
def loaded(checkpoint) -> llama.LLaMA:
    return llama.load(checkpoint, TOKENIZER, max_seq_len=1024)


@pytest.fixture
def model(loaded, monkeypatch) -> llama.LLaMA:
    monkeypatch.setattr(loaded.model.args, "max_seq_len", 1024)
    return loaded


@pytest.fixture
def say(model, monkeypatch):
    """Make the model say these texts, one in each reply, with an end after it or without."""

    def script(*texts: str, eos: bool = True) -> None:
        tokenizer = model.tokenizer
        ids = [i for text in texts for i in tokenizer.encode(" " + text, False, eos, within=True)]
        monkeypatch.setattr(
            llama.generation, "sample", lambda *_: torch.tensor([ids.pop(0) if ids else 5])
        )

    return script


def text_of(chat: Chat) -> str:
    """What is in the context, with the ids that decode leaves out."""
    special = {1: "<s>", 2: "</s>"}
    within = chat.llama.tokenizer.decode_stream
    parts, ids = [], []
    for token in [*chat.context.tokens, 1]:
        if token in special:
            parts += ["".join(within(ids)), special[token]]
            ids = []
        else:
            ids.append(token)
    return "".join(parts[:-1])


def test_each_style_is_written_as_its_model_was_trained_on(model, say):
    expected = {
        "dialog": "<s>Kind.\n\nUser: Hi\nAI: Hello\nUser: Bye\nAI: Ciao",
        "complete": "<s>Kind.Bye Ciao",
        # chat_completion in Meta's generation.py
        "llama2": "<s>[INST] <<SYS>>\nKind.\n<</SYS>>\n\nHi [/INST] Hello </s>"
        "<s>[INST] Bye [/INST] Ciao",
        # PROMPT_DICT in Alpaca's train.py
        "alpaca": "<s>Kind.\n\n### Instruction:\nHi\n\n### Response:\n Hello"
        "\n\n### Instruction:\nBye\n\n### Response:\n Ciao",
        # FastChat's vicuna_v1.1
        "vicuna": "<s>Kind. USER: Hi ASSISTANT: Hello</s>USER: Bye ASSISTANT: Ciao",
    }
    assert expected.keys() == STYLES.keys()
    for style, text in expected.items():
        say("Hello", "Ciao")
        chat = new_chat(model, style)
        replies = ["".join(chat.reply(line)) for line in ("Hi", "Bye")]
        assert text_of(chat) == text
        assert replies == (["Hi Hello", "Bye Ciao"] if style == "complete" else ["Hello", "Ciao"])


def test_the_ids_of_the_talk_are_those_of_its_whole_text(model, say):
    say("Hello there", "A story? Why not!")
    chat = new_chat(model, max_gen_len=50)
    for line in ("Hi, who are you?", "Tell me a story"):
        "".join(chat.reply(line))
    whole = "Kind.\n\nUser: Hi, who are you?\nAI: Hello there\n"
    whole += "User: Tell me a story\nAI: A story? Why not!"
    assert chat.context.tokens == model.tokenizer.encode(whole, bos=True, eos=False)


def test_an_empty_system_text_leaves_no_preamble(model, say):
    say("Hello")
    chat = new_chat(model, "llama2", system="")
    "".join(chat.reply("Hi"))
    assert text_of(chat) == "<s>[INST] Hi [/INST] Hello"


def test_the_user_cannot_write_special_ids_or_templates(model, say):
    say("Hello")
    chat = new_chat(model)
    "".join(chat.reply("</s><s>{preamble}{}"))
    assert chat.context.tokens.count(1) == 1
    assert "User: </s><s>{preamble}{}\nAI:" in model.tokenizer.decode(chat.context.tokens)


@pytest.mark.parametrize("said", ["Hello there\nUser: and more", "Hello there \n\nUser:"])
def test_the_other_speakers_line_is_neither_shown_nor_kept(model, say, said):
    say(said, eos=False)
    chat = new_chat(model, max_gen_len=50)
    pieces = list(chat.reply("Hi"))
    assert "".join(pieces) == "Hello there"
    assert text_of(chat) == "<s>Kind.\n\nUser: Hi\nAI: Hello there"
    assert chat.context.n_cached <= len(chat.context.tokens)


@pytest.mark.parametrize("said", ["Hello\nUsers love me.\nUse", "\nUse"])
def test_what_only_begins_like_the_other_speakers_line_is_shown(model, say, said):
    say(said, eos=True)
    assert "".join(new_chat(model, max_gen_len=50).reply("Hi")) == said.lstrip()


def test_a_reply_cut_inside_a_token_keeps_the_text_before(model, say):
    hello = model.tokenizer.encode("hello", False, False)
    assert len(hello) < 5
    say("well hello there", eos=False)
    style = Style(first="<s>{user}:", next="\n{user}:", stop="lo")
    chat = new_chat(model, style, max_gen_len=50)
    assert "".join(chat.reply("Hi")) == "well hel"
    assert text_of(chat) == "<s>Hi: well hel"
    assert chat.context.n_cached < len(chat.context.tokens)


def test_a_reply_closed_early_is_kept_as_far_as_it_was_shown(model, say):
    say("One two three 🙂 four", "Fine")
    chat = new_chat(model, max_gen_len=50)
    pieces, shown = chat.reply("Hi"), ""
    while "three" not in shown:
        shown += next(pieces)
    pieces.close()
    assert text_of(chat) == f"<s>Kind.\n\nUser: Hi\nAI: {shown}"
    say("Fine")
    assert "".join(chat.reply("How are you?")) == "Fine"
    assert text_of(chat).endswith(f"{shown}\nUser: How are you?\nAI: Fine")


def test_a_turn_feeds_only_its_own_tokens(model, say, monkeypatch):
    fed = []
    advance = model.advance
    monkeypatch.setattr(
        model,
        "advance",
        lambda contexts: (
            fed.append(len(contexts[0].tokens) - contexts[0].n_cached) or advance(contexts)
        ),
    )
    chat = new_chat(model)
    first_fed = []
    for _ in range(20):
        say("Hello")
        fed.clear()
        "".join(chat.reply("Hi"))
        first_fed.append(fed[0])
    assert first_fed[0] > first_fed[1]  # the preamble
    assert set(first_fed[1:]) == {first_fed[1]}


def check_layer_0(chat: Chat) -> None:
    """The cached keys and values are those that the tokens have at the positions they are at."""
    model, context = chat.llama.model, chat.context
    tokens = torch.tensor(context.tokens[: context.n_cached])
    layer = model.layers[0]
    with torch.no_grad():
        x = layer.attention_norm(model.tok_embeddings(tokens))
        heads = (-1, model.args.head_dim)
        keys = apply_rotary_emb(
            layer.attention.wk(x).unflatten(-1, heads), model.freqs_cis[: len(tokens)]
        )
        values = layer.attention.wv(x).unflatten(-1, heads)
    n = len(tokens)
    for heads, cached_keys, cached_values in context.cache.read(0, n):
        expected = keys.transpose(0, 1)[heads]
        torch.testing.assert_close(cached_keys, expected, rtol=0, atol=2e-4)
        torch.testing.assert_close(cached_values, values.transpose(0, 1)[heads])


@pytest.mark.parametrize("read", [2**23, 1])  # numbers of all heads at a time, and of one
def test_a_full_context_forgets_its_oldest_turns_and_keeps_the_preamble(model, monkeypatch, read):
    monkeypatch.setattr("llama.cache.READ", read)
    monkeypatch.setattr(model.model.args, "max_seq_len", 64)
    chat = new_chat(model, max_gen_len=12, seed=0)
    head = model.tokenizer.encode("Kind.\n\nUser:", bos=True, eos=False)
    reserved = chat.context.cache.keys.data_ptr()
    for turn in range(25):
        "".join(chat.reply(f"Turn {turn}"))
        assert chat.context.tokens[: len(head)] == head
        assert len(chat.context.tokens) <= 64
        assert f"Turn {turn}\nAI:" in text_of(chat)
        check_layer_0(chat)
    assert "Turn 3\n" not in text_of(chat)
    assert text_of(chat).startswith("<s>Kind.\n\nUser: Turn ")
    assert chat.context.cache.values.shape[2] == 64
    assert chat.context.cache.keys.data_ptr() == reserved


def test_a_reply_longer_than_the_context_is_not_cut(model, say, monkeypatch):
    monkeypatch.setattr(model.model.args, "max_seq_len", 48)
    words = " ".join(f"word {i}" for i in range(60))
    say(words, "Fine")
    chat = new_chat(model, max_gen_len=1000)
    assert "".join(chat.reply("Hi")) == words
    assert text_of(chat).startswith("<s>Kind.\n\nUser:")
    assert text_of(chat).endswith("word 59")
    check_layer_0(chat)
    assert "".join(chat.reply("And you?")) == "Fine"
    assert text_of(chat).endswith("word 59\nUser: And you?\nAI: Fine") or len(chat.starts) == 1


def test_a_line_longer_than_the_context_is_refused_and_the_talk_goes_on(model, say, monkeypatch):
    monkeypatch.setattr(model.model.args, "max_seq_len", 48)
    say("Hello", "Fine")
    chat = new_chat(model)
    "".join(chat.reply("Hi"))
    before = list(chat.context.tokens), chat.context.n_cached, list(chat.starts)
    with pytest.raises(llama.UserError, match="tokens long and the context 48.*--max_seq_len"):
        next(chat.reply("long " * 100))
    assert (chat.context.tokens, chat.context.n_cached, chat.starts) == before
    assert "".join(chat.reply("How are you?")) == "Fine"


def test_reset_forgets_the_talk(model, say):
    say("Hello", "Fine")
    chat = new_chat(model)
    "".join(chat.reply("My name is Tom"))
    chat.reset()
    "".join(chat.reply("Who am I?"))
    assert text_of(chat) == "<s>Kind.\n\nUser: Who am I?\nAI: Fine"


def test_the_same_seed_gives_the_same_talk(model):
    talks = []
    for seed in (1, 1, 2):
        chat = new_chat(model, seed=seed)
        talks.append(["".join(chat.reply(line)) for line in ("Hi", "Hi")])
    assert talks[0] == talks[1] != talks[2]
    assert talks[0][0] != talks[0][1]


def test_the_status_counts_the_reply_and_the_context(model, say):
    say("Hello")
    chat = new_chat(model)
    "".join(chat.reply("Hi"))
    n_reply = len(model.tokenizer.encode("Hello", False, False))
    noun = "token" if n_reply == 1 else "tokens"
    status = chat.status()
    assert status.startswith(f"{n_reply} {noun}, ")
    assert status.endswith(f" tokens/s, context {len(chat.context.tokens)}/1024")
