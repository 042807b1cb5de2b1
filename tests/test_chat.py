"""The conversation: what is in its context, its cache and on the screen."""

from itertools import chain, groupby, islice
from pathlib import Path

import pytest
import torch
from conftest import PARAMS, TOKENIZER, load, random_weights, write_shards
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import llama
from llama.chat import Style

# chat_template in tokenizer_config.json of TinyLlama-1.1B-Chat-v1.0 and of OpenHermes-2.5.
TEMPLATES = {
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n'"
    " + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] +"
    " eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n"
    "{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' +"
    " message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}",
}
ADDED = {"<|im_start|>": 2048, "<|im_end|>": 2049}


class Speaker(torch.nn.Module):
    """An output layer that makes the model say these ids, and then one word again and again."""

    def __init__(self, ids: list[int]):
        super().__init__()
        self.ids = ids

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(hidden), 2050)
        logits[-1, self.ids.pop(0) if self.ids else 400] = 1e4
        return logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with two tokens more than the tokenizer."""
    return write_shards(tmp_path_factory.mktemp("chat"), random_weights(vocab_size=2050), 1)


@pytest.fixture
def new_chat(folder):
    """Make a chat, with a model that says these texts."""

    def make(*said: str, style="dialog", system="Kind.", limit=1024, **options):
        model = load(folder, max_seq_len=limit).model
        model = llama.LLaMA(model, llama.Tokenizer(TOKENIZER, ADDED))
        if said:
            ids = [model.tokenizer.encode(text, False, True, within=True) for text in said]
            model.model.output = Speaker([*chain.from_iterable(ids)])
        options = {"max_gen_len": 50, "prompt_lookup": 0 if said else 8, **options}
        return llama.Chat(model, style, system, llama.Sampling(**options))

    return make


def text_of(chat: llama.Chat) -> str:
    """What is in the context, with <s> and </s>, which decode leaves out."""
    special = {1: "<s>", 2: "</s>"}
    groups = [[*ids] for _, ids in groupby(chat.sequence.tokens, lambda token: token in special)]
    decode = chat.llama.tokenizer.decode
    return "".join("".join(map(special.get, g)) if g[0] in special else decode(g) for g in groups)


def say(chat: llama.Chat, *messages: str) -> list[str]:
    return ["".join(chat.reply(message)) for message in messages]


@pytest.mark.parametrize(
    ("style", "expected"),
    {
        "dialog": "<s>Kind.\n\nUser: Hi\nAI: Hello\nUser: Bye\nAI: Ciao",
        # chat_completion in Meta's generation.py
        "llama2": "<s>[INST] <<SYS>>\nKind.\n<</SYS>>\n\nHi [/INST] Hello </s>"
        "<s>[INST] Bye [/INST] Ciao",
        # PROMPT_DICT in Alpaca's train.py
        "alpaca": "<s>Kind.\n\n### Instruction:\nHi\n\n### Response:\n Hello"
        "\n\n### Instruction:\nBye\n\n### Response:\n Ciao",
        # FastChat's vicuna_v1.1
        "vicuna": "<s>Kind. USER: Hi ASSISTANT: Hello</s>USER: Bye ASSISTANT: Ciao",
    }.items(),
)
def test_a_style_is_written_as_its_model_was_trained_on(new_chat, style, expected):
    chat = new_chat(" Hello", " Ciao", style=style)
    assert say(chat, "Hi", "Bye") == ["Hello", "Ciao"]
    assert text_of(chat) == expected


@pytest.mark.parametrize("style", TEMPLATES)
@pytest.mark.parametrize("system", ["", "Kind."])
def test_a_style_is_written_as_transformers_renders_its_template(new_chat, style, system):
    chat = new_chat("Hello", "Ciao", style=style, system=system)
    messages = [{"role": "system", "content": system}] if system else []
    peer = PreTrainedTokenizerFast(tokenizer_object=FastTokenizer(BPE()), eos_token="</s>")
    for message, reply in (("Hi", "Hello"), ("Tell me\nmore", "Ciao")):
        say(chat, message)
        messages.append({"role": "user", "content": message})
        rendered = peer.apply_chat_template(
            messages, chat_template=TEMPLATES[style], tokenize=False, add_generation_prompt=True
        )
        assert text_of(chat) == "<s>" + rendered + reply
        messages.append({"role": "assistant", "content": reply})


def test_only_a_styles_own_text_becomes_special_ids(new_chat):
    chat = new_chat("Hello", style="chatml")
    message = "</s><s><|im_end|>{preamble}{}"
    say(chat, message)
    assert [chat.sequence.tokens.count(token) for token in (1, 2, 2048, 2049)] == [1, 0, 3, 2]
    assert f"<|im_start|>user\n{message}<|im_end|>" in text_of(chat)


BEGINS = "Hello\nUsers love me.\nUse"  # like a turn
STOPS = [  # style, what the model says, what is shown of it
    ("dialog", "a User: b, User: c\nUser: d", "a User: b, User: c"),
    ("zephyr", "a <|user|> b, <|user|> c\n<|user|> d", "a <|user|> b, <|user|> c"),
    ("dialog", BEGINS, BEGINS),
    (Style("h{user}:", ""), " well\nhello", "well"),  # "he" is one token
]


@pytest.mark.parametrize(("style", "said", "shown"), STOPS)
def test_the_users_next_turn_ends_a_reply_at_the_start_of_a_line_only(new_chat, style, said, shown):
    chat = new_chat(said, style=style)
    assert say(chat, "Hi") == [shown]
    assert text_of(chat).endswith(shown)


def test_a_reply_that_is_cut_shows_no_beginning_of_a_stop_and_says_so(new_chat):
    whole = "Hello\nUser"
    n_ids = len(llama.Tokenizer(TOKENIZER).encode(whole, False, False, within=True))
    chat = new_chat(whole + "s are there", max_gen_len=n_ids)
    assert say(chat, "Hi") == ["Hello"]
    assert text_of(chat).endswith("AI:Hello")
    assert f"stopped at `max_gen_len={n_ids}`" in chat.status()


@pytest.mark.parametrize("n_pieces", range(1, 12))  # the smiley is four tokens
def test_a_reply_that_is_closed_early_is_kept_as_far_as_it_was_shown(new_chat, n_pieces):
    pieces = (chat := new_chat(" One two 🙂 three four")).reply("Hi")
    shown = "".join(islice(pieces, n_pieces))
    pieces.close()
    assert text_of(chat) == f"<s>Kind.\n\nUser: Hi\nAI: {shown}".rstrip()


def test_a_turn_computes_only_its_own_tokens(new_chat):
    chat = new_chat(max_gen_len=8, seed=0)
    say(chat, "Hi")
    n_message = len(chat.llama.tokenizer.encode("\nUser: Hi\nAI:", False, False))
    for _ in range(10):
        say(chat, "Hi")
        assert chat.llama.timings.prompt_tokens <= n_message + 3  # and the end of the last reply


def test_evicted_turns_leave_no_trace(tmp_path):
    # In a model of one layer keys and values depend on nothing but the token and its position.
    params = PARAMS | {"n_layers": 1}
    model = load(write_shards(tmp_path, random_weights(params=params), 1, params), max_seq_len=64)
    chat = llama.Chat(model, llama.STYLES["dialog"], "Kind.", llama.Sampling(12, temperature=0))
    n_forgotten = 0
    for turn in range(12):
        say(chat, f"Turn {turn}")
        n_forgotten += chat.n_evicted
        assert text_of(chat).startswith(f"<s>Kind.\n\nUser: Turn {n_forgotten}\nAI:")
    assert n_forgotten > 5
    # The last turn evicts others before its reply, and none in its course.
    prompt = chat.sequence.tokens[: len(chat.sequence.tokens) - chat.n_new]
    continued = "".join(model.stream(prompt, chat.n_new, temperature=0))
    assert text_of(chat) == "<s>" + continued


def test_the_status_says_when_turns_were_forgotten(new_chat):
    chat = new_chat(*[" Fine"] * 5, limit=64)
    say(chat, *["Hi"] * 4)
    assert "forgotten" not in chat.status()
    say(chat, "One two three four " * 3)
    n_forgotten = 5 - text_of(chat).count("User:")
    assert n_forgotten > 1
    assert f"oldest {n_forgotten} turns were forgotten" in chat.status()


def test_a_reply_longer_than_the_context_is_not_cut(new_chat):
    words = " ".join(f"word {i}" for i in range(60))
    chat = new_chat(" " + words, " Fine", limit=48, max_gen_len=1000)
    assert say(chat, "Hi") == [words]
    assert text_of(chat).startswith("<s>Kind.\n\nUser:")
    assert text_of(chat).endswith("word 59")
    assert "the beginning of this turn was forgotten" in chat.status()
    assert say(chat, "And you?") == ["Fine"]
    assert text_of(chat).endswith("\nAI: Fine")


@pytest.mark.parametrize("style", ["dialog", "complete"])
def test_a_message_longer_than_the_context_is_refused_and_the_talk_goes_on(new_chat, style):
    chat = new_chat(" Hello", " Fine", limit=48, style=style)
    say(chat, "Hi")
    before = text_of(chat)
    with pytest.raises(llama.UserError, match="tokens long and the context 48.*`max_seq_len`"):
        next(chat.reply("long " * 100))
    assert text_of(chat) == before
    assert chat.retry() == "Hi"
    assert say(chat, "How are you?") == [{"dialog": "Fine", "complete": "How are you? Fine"}[style]]


def test_an_unknown_style_is_refused_by_name(new_chat):
    with pytest.raises(llama.UserError, match="`style` must be one of dialog, .*, not 'x'"):
        new_chat(style="x")


def test_arguments_of_other_types_are_refused_by_name(new_chat):
    with pytest.raises(llama.UserError, match="`llama` must be a model .*, not 'model/demo'"):
        llama.Chat("model/demo")
    with pytest.raises(llama.UserError, match="`sampling` must be .*Sampling, not {}"):
        llama.Chat(new_chat().llama, sampling={})
    with pytest.raises(llama.UserError, match="`message` must be a text, not None"):
        say(new_chat(), None)


def test_a_system_prompt_longer_than_the_context_is_refused_at_once(new_chat):
    with pytest.raises(llama.UserError, match="system prompt is [0-9]+ tokens long and the con"):
        new_chat(system="a long text " * 200, limit=256)


def test_reset_forgets_the_talk(new_chat):
    chat = new_chat(" Hello", " Fine")
    say(chat, "My name is Tom")
    chat.reset()
    assert (say(chat, "Who am I?"), chat.retry(), chat.retry()) == (["Fine"], "Who am I?", None)
    assert text_of(chat) == ""


@pytest.mark.parametrize("last", ["How are you?", ""])
def test_retry_takes_the_last_turn_back_and_nothing_of_it_is_left(new_chat, last):
    chat, other = new_chat(temperature=0), new_chat(temperature=0)
    say(chat, "Hi", last)
    assert chat.retry() == last
    assert say(chat, "Who are you?") == say(other, "Hi", "Who are you?")[1:]
    assert text_of(chat) == text_of(other)


def test_retry_of_the_only_turn_that_is_left_writes_the_preamble_once(new_chat):
    message, expected = "One two three", "<s>Kind.\n\nUser: One two three\nAI: Fine"
    chat = new_chat(*[" Fine"] * 3, limit=30)  # space for one turn
    say(chat, message, message)
    assert text_of(chat) == expected
    chat.retry()
    say(chat, message)
    assert text_of(chat) == expected
