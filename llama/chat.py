"""Chat: prompt formats, and a conversation whose tokens stay in the key-value cache."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .errors import check
from .generation import LLaMA, SequenceState, Timings, check_length, common_length
from .lookup import PromptLookup
from .sampling import Sampling
from .tokenizer import split_at


@dataclass(frozen=True)
class Style:
    """A prompt format: how a conversation is written for the model.

    <s>, </s> and the tokenizer's added tokens become their ids; {user} is the user's message,
    {system} the system prompt.
    """

    turn: str  # the text before a reply; {preamble} is empty after the first turn
    separator: str | None  # between a reply and the next turn; None: messages are independent
    preamble: str = "{system}"  # of the first turn, if there is a system prompt
    system: str = ""  # the default system prompt

    @property
    def stop(self) -> str:
        """The start of the user's next turn. A reply that contains it ends there."""
        before = self.turn.replace("{preamble}", "").partition("{user}")[0].rstrip()
        return "\0" if self.separator is None else f"\n{before}"


STYLES = {
    # For models without chat training: plain LLaMA goes on with a dialog.
    "dialog": Style(
        turn="{preamble}User: {user}\nAI:",
        separator="\n",
        preamble="{system}\n\n",
        system="This is a dialog between a user and a kind AI that tells stories and answers"
        " every question as well as it can.",
    ),
    "complete": Style(turn="{preamble}{user}", separator=None),
    # Llama 2 Chat: arXiv 2307.09288, and chat_completion in Meta's release.
    "llama2": Style(
        turn="[INST] {preamble}{user} [/INST]",
        separator=" </s><s>",
        preamble="<<SYS>>\n{system}\n<</SYS>>\n\n",
        system="You are a helpful, respectful and honest assistant.",
    ),
    # Stanford Alpaca's prompt without input, turn after turn.
    "alpaca": Style(
        turn="{preamble}### Instruction:\n{user}\n\n### Response:\n",
        separator="\n\n",
        preamble="{system}\n\n",
        system="Below is an instruction that describes a task. Write a response that appropriately"
        " completes the request.",
    ),
    # Vicuna v1.1 and later.
    "vicuna": Style(
        turn="{preamble}USER: {user} ASSISTANT:",
        separator="</s>",
        preamble="{system} ",
        system="A chat between a curious user and an artificial intelligence assistant. The"
        " assistant gives helpful, detailed, and polite answers to the user's questions.",
    ),
    # Mistral-Instruct, to version 0.2, and since.
    "mistral": Style("[INST] {preamble}{user} [/INST]", "</s>", "{system}\n\n"),
    "mistral-v3": Style("[INST] {preamble}{user}[/INST]", "</s>", "{system}\n\n"),
    # TinyLlama-Chat 1.0 and Zephyr.
    "zephyr": Style(
        turn="{preamble}<|user|>\n{user}</s>\n<|assistant|>\n",
        separator="</s>\n",
        preamble="<|system|>\n{system}</s>\n",
    ),
    # OpenHermes and other fine-tunes of LLaMA and Mistral, with added tokens.
    "chatml": Style(
        turn="{preamble}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n",
        separator="<|im_end|>\n",
        preamble="<|im_start|>system\n{system}<|im_end|>\n",
    ),
}


class Chat:
    """One conversation.

    When the context is full, the oldest turns are evicted, from the cache too; the system prompt
    stays. Each turn computes only its own tokens.

    Args:
        llama: The model, as `load` returns it.
        style: The prompt format, or the name of one of STYLES. Default: the model's chat_style.
        system: The system prompt. None: the style's; "": no system prompt.
        sampling: How replies are drawn; max_gen_len limits one reply.
    """

    def __init__(
        self,
        llama: LLaMA,
        style: Style | str | None = None,
        system: str | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008  (it is frozen)
    ):
        check(isinstance(llama, LLaMA), "llama", "a model that llama.load returns", llama)
        check(isinstance(sampling, Sampling), "sampling", "a llama.Sampling", sampling)
        if not isinstance(style, Style):
            style = llama.chat_style if style is None else style
            check(style in STYLES, "style", f"one of {', '.join(STYLES)}", style)
            style = STYLES[style]
        self.llama, self.style, self.sampling = llama, style, sampling
        self.limit = llama.model.args.max_seq_len
        self.generator = sampling.generator()
        self.system = style.system if system is None else system
        cache, lookup = llama.model.new_cache(self.limit), PromptLookup(sampling.prompt_lookup)
        self.sequence = SequenceState([], cache, lookup, torch.empty(0))
        self.reset()
        check_length("the system prompt", len(self.encode(self.template(True), "")), self.limit)

    def reset(self) -> None:
        """Begin a new conversation."""
        self.truncate(0)
        self.message_starts: list[int] = []  # where each turn's message begins in the context
        self.last_message, self.last_turn_start = None, 0
        self.begin_reply()

    def begin_reply(self) -> None:
        """Reset what `status` reports of a reply."""
        self.llama.timings = Timings()
        self.n_new = 0  # tokens of the reply
        self.is_cut = False  # max_gen_len ended the reply
        self.n_evicted = 0  # older turns that were evicted for the reply
        self.is_halved = False  # the beginning of this turn was evicted

    def reply(self, message: str) -> Iterator[str]:
        """Yield the reply to a message in pieces. If closed, the context keeps what was yielded.

        Raises:
            UserError: The message is longer than the context. The conversation stays as it is.
        """
        check(isinstance(message, str), "message", "a text", message)
        message = message.strip()
        self.begin_reply()
        self.begin_turn(message)
        text, shown = message if self.style.separator is None else "", ""
        n_decoded = 0  # a character may consist of several tokens: `text` has it after the last one
        try:
            for piece in self.llama.tokenizer.decode_stream(self.new_tokens(), within=True):
                text += piece
                n_decoded = self.n_new if piece else n_decoded
                shown, before = visible_part(text, self.style.stop), shown
                yield shown[len(before) :]
                if self.style.stop in text:
                    return
            self.is_cut = self.n_new == self.sampling.max_gen_len
            if not self.is_cut:  # no stop string follows: show what was held back
                shown, before = text.strip(), shown
                yield shown[len(before) :]
        finally:
            self.truncate(len(self.sequence.tokens) - (self.n_new - n_decoded))
            self.remove_tail(text.lstrip()[len(shown) :] if shown else text)

    def retry(self) -> str | None:
        """Remove the last turn from the context. Returns its message, to be sent again, if any."""
        message, self.last_message = self.last_message, None
        if message is not None:
            self.message_starts.pop()
            self.truncate(self.last_turn_start if self.message_starts else 0)
        return message

    def begin_turn(self, message: str) -> None:
        """Append one turn to the context, and leave room for at least one token."""
        is_first = self.style.separator is None or not self.message_starts
        template = self.template(is_first)
        ids = self.encode(template, message)
        # Ids of this turn before its message, and ids that eviction never removes.
        n_before = common_length(ids, self.encode(template.partition("{user}")[0], ""))
        n_kept = n_before if is_first else self.message_starts[0]
        length = n_kept + len(ids) - n_before
        check_length("this message, with what always precedes it,", length, self.limit)
        if is_first:
            self.reset()
        self.sequence.uniforms = self.sampling.uniforms(self.generator)
        self.last_message, self.last_turn_start = message, len(self.sequence.tokens)
        self.message_starts.append(self.last_turn_start + n_before)
        self.sequence.tokens += ids
        while len(self.sequence.tokens) >= self.limit:
            self.evict()

    def template(self, is_first: bool) -> str:
        """The format of the first or of another turn."""
        preamble = self.style.preamble if self.system and is_first else ""
        before = "<s>" if is_first else self.style.separator
        return before + self.style.turn.replace("{preamble}", preamble)

    def encode(self, template: str, message: str) -> list[int]:
        """The ids of a filled-in template. Special tokens are recognized in the template only."""
        tokenizer = self.llama.tokenizer
        special = {"<s>": tokenizer.bos_id, "</s>": tokenizer.eos_id} | tokenizer.added_tokens
        ids: list[int] = []
        for part in split_at(special, template):
            if part in special:
                ids.append(special[part])
            elif part:
                starts_text = bool(ids) and ids[-1] in (tokenizer.bos_id, tokenizer.eos_id)
                text = part.format(system=self.system, user=message)
                ids += tokenizer.encode_plain(text, within=not starts_text)
        return ids

    def new_tokens(self) -> Iterator[int]:
        """Generate the reply's tokens. If closed early, the context has those that were yielded."""
        for tokens in self.llama.extend([self.sequence], self.sampling):
            n_read = 0
            try:
                for n_read, token in enumerate(tokens, 1):
                    self.n_new += 1
                    yield token
            finally:
                self.truncate(len(self.sequence.tokens) - (len(tokens) - n_read))
            if len(self.sequence.tokens) >= self.limit and len(self.sequence.uniforms):
                self.evict()

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens of the sequence."""
        sequence = self.sequence
        if length < len(sequence.tokens):
            del sequence.tokens[length:]
            sequence.n_cached = min(sequence.n_cached, length)
            sequence.lookup.reset()

    def evict(self) -> None:
        """Remove the oldest turn or, if there is only one, the older half of it."""
        sequence, start, n_cached = self.sequence, self.message_starts[0], self.sequence.n_cached
        if len(self.message_starts) > 1:
            end = self.message_starts[1]
            self.n_evicted += 1
        else:
            end = start + (len(sequence.tokens) - start + 1) // 2
            self.is_halved = True
        sequence.n_cached = min(start, n_cached)  # first, so that Ctrl-C leaves a valid state
        del sequence.tokens[start:end]
        sequence.lookup.reset()
        self.message_starts = [start, *(n - (end - start) for n in self.message_starts[2:])]
        self.last_turn_start = max(self.last_turn_start - (end - start), start)
        if n_cached > end:
            self.llama.model.evict(sequence.cache, start, end, n_cached)
            sequence.n_cached = n_cached - (end - start)

    def remove_tail(self, tail: str) -> None:
        """Remove a text from the end of the sequence.

        If the first of its tokens also holds text that stays, that text is encoded again.
        """
        tokenizer, tokens, n = self.llama.tokenizer, self.sequence.tokens, 0
        while tail and n < self.n_new:
            n += 1
            text = "".join(tokenizer.decode_stream(tokens[-n:], within=True))
            if text.endswith(tail):
                self.truncate(len(tokens) - n)
                tokens += tokenizer.encode_plain(text[: -len(tail)], within=True)
                return

    def status(self) -> str:
        """The last reply's length and speed, how much of the context is used, and what was cut."""
        tokens = "1 token" if self.n_new == 1 else f"{self.n_new} tokens"
        used = f"context {len(self.sequence.tokens)}/{self.limit}"
        timings = self.llama.timings
        rates = [f"{timings.new_rate:.1f} tokens/s"] if timings.new_tokens else []
        parts = [tokens, *rates, used]
        if self.is_cut:
            parts.append(f"stopped at `max_gen_len={self.sampling.max_gen_len}`")
        if self.n_evicted:
            turns = "turn was" if self.n_evicted == 1 else f"{self.n_evicted} turns were"
            parts.append(f"the oldest {turns} forgotten")
        if self.is_halved:
            parts.append("the beginning of this turn was forgotten")
        return ", ".join(parts)


def visible_part(text: str, stop: str) -> str:
    """The text before the stop string, without a suffix that may begin one, stripped."""
    reply, stopped, _ = text.partition(stop)
    held = () if stopped else (n for n in range(len(stop)) if reply.endswith(stop[:n]))
    return reply[: len(reply) - max(held, default=0)].strip()
