"""A conversation that stays in the key-value cache, written as the model was trained to read it."""

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from os.path import commonprefix  # of any sequences, in spite of its place

from .errors import UserError
from .generation import LLaMA, Sampling, Timings


@dataclass(frozen=True)
class Style:
    """How a conversation is written out: where text stands for the reply, the model goes on.

    In first and next, <s> and </s> are the ids that begin and end a sequence, {user} is the user's
    line and {preamble} what the system text becomes (nothing, where that is empty).
    """

    first: str  # the first turn, up to the reply
    next: str | None  # each later turn, after the reply before; None: every line stands alone
    stop: str = "\0"  # begins the user's line, and so ends a reply, as </s> always does
    preamble: str = "{system}"
    system: str = ""  # without --system


STYLES = {
    # Plain LLaMA has read many dialogs, and goes on with one.
    "dialog": Style(
        first="<s>{preamble}User: {user}\nAI:",
        next="\nUser: {user}\nAI:",
        stop="\nUser:",
        preamble="{system}\n\n",
        system="This is a dialog between a user and a kind AI that tells stories and answers"
        " every question as well as it can.",
    ),
    "complete": Style(first="<s>{preamble}{user}", next=None),
    # Llama 2 Chat: arXiv 2307.09288, and chat_completion in Meta's release.
    "llama2": Style(
        first="<s>[INST] {preamble}{user} [/INST]",
        next=" </s><s>[INST] {user} [/INST]",
        stop="[INST]",
        preamble="<<SYS>>\n{system}\n<</SYS>>\n\n",
        system="You are a helpful, respectful and honest assistant.",
    ),
    # Stanford Alpaca's prompt without input, turn after turn.
    "alpaca": Style(
        first="<s>{preamble}### Instruction:\n{user}\n\n### Response:\n",
        next="\n\n### Instruction:\n{user}\n\n### Response:\n",
        stop="\n### Instruction:",
        preamble="{system}\n\n",
        system="Below is an instruction that describes a task. Write a response that appropriately"
        " completes the request.",
    ),
    # Vicuna v1.1 and later.
    "vicuna": Style(
        first="<s>{preamble}USER: {user} ASSISTANT:",
        next="</s>USER: {user} ASSISTANT:",
        stop="USER:",
        preamble="{system} ",
        system="A chat between a curious user and an artificial intelligence assistant. The"
        " assistant gives helpful, detailed, and polite answers to the user's questions.",
    ),
}


class Chat:
    """One conversation: `reply` takes the user's lines, one after another.

    Its tokens are the context's. What comes before the first user's words stays; when the context
    is full, the oldest turns after that are cut out, also of the cache.
    """

    def __init__(self, llama: LLaMA, style: Style, system: str | None, sampling: Sampling):
        self.llama, self.style, self.sampling = llama, style, sampling
        self.limit = llama.model.args.max_seq_len
        self.generator = sampling.generator()
        self.n_new = 0  # tokens of the last reply
        text = style.system if system is None else system
        self.preamble = style.preamble.format(system=text) if text else ""
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self.context = self.llama.context([], self.limit)
        self.starts: list[int] = []  # in the context: where the user's words begin, turn by turn

    def reply(self, line: str) -> Iterator[str]:
        """The reply in pieces, as it comes; closed early, the context keeps what was yielded.

        Raises UserError, and leaves all as it was, where the line alone overfills the context.
        """
        line = line.strip()
        self.begin_turn(line)
        self.llama.timings, self.n_new = Timings(), 0
        stop = self.style.stop
        text = line if self.style.next is None else ""
        ends = [len(text)]  # of the text, after as many tokens
        shown = 0

        def new(end: int) -> str:
            nonlocal shown
            begin, shown = shown, end
            return text[begin:end] if begin else text[:end].lstrip()

        try:
            for piece in self.llama.tokenizer.decode_stream(self.new_tokens(), within=True):
                text += piece
                ends.append(len(text))
                yield new(len(certain(text, stop)))
                if stop in text:
                    return
            yield new(len(text.rstrip()))
        finally:
            self.cut_reply(text[:shown], ends)

    def begin_turn(self, line: str) -> None:
        """Append the user's words and what leads to the reply, with room for one token more."""
        if self.style.next is None:
            self.reset()
        template = self.style.next if self.starts else self.style.first
        ids = self.encode(template, line)
        lead = len(commonprefix([ids, self.encode(template.partition("{user}")[0], line)]))
        length = len(ids) - lead + (self.starts[0] if self.starts else lead)
        if length >= self.limit:
            raise UserError(
                f"this line, with what always precedes it, is {length} tokens long and the "
                f"context {self.limit}: shorten it, or give a --max_seq_len above {length}"
            )
        self.starts.append(len(self.context.tokens) + lead)
        self.context.tokens += ids
        while len(self.context.tokens) >= self.limit:
            self.forget()

    def encode(self, template: str, line: str) -> list[int]:
        tokenizer = self.llama.tokenizer
        special = {"<s>": tokenizer.bos_id, "</s>": tokenizer.eos_id}
        ids: list[int] = []
        for part in re.split("(</?s>)", template):
            if part in special:
                ids.append(special[part])
            elif part:
                text = part.format(preamble=self.preamble, user=line)
                # After a special id a text begins; otherwise it goes on with the reply.
                ids += tokenizer.encode(text, bos=False, eos=False, within=not ids)
        return ids

    def new_tokens(self) -> Iterator[int]:
        steps = self.llama.extend([self.context], self.sampling, self.generator)
        for token in chain.from_iterable(steps):
            self.n_new += 1
            yield token
            if len(self.context.tokens) >= self.limit:
                self.forget()

    def forget(self) -> None:
        """Cut out the oldest turn or, where there is one alone, the older half of that."""
        context, start, n_cached = self.context, self.starts[0], self.context.n_cached
        middle = start + (len(context.tokens) - start + 1) // 2
        end = self.starts[1] if len(self.starts) > 1 else middle
        context.n_cached = min(start, n_cached)  # true at each moment: Ctrl-C may come in between
        del context.tokens[start:end]
        self.starts = [start] + [later - (end - start) for later in self.starts[2:]]
        if n_cached > end:
            self.llama.model.drop(context.cache, start, end, n_cached)
            context.n_cached = n_cached - (end - start)

    def cut_reply(self, kept: str, ends: list[int]) -> None:
        """Leave of the reply's tokens those that make the text that is kept."""
        n, rest = bisect_left(ends, len(kept)), ""
        if n < len(ends) and ends[n] > len(kept):  # the text ends inside a token
            n, rest = n - 1, kept[ends[n - 1] :]
        context = self.context
        n_cut = max(self.n_new - n, 0)
        del context.tokens[max(self.starts[-1], len(context.tokens) - n_cut) :]
        context.n_cached = min(context.n_cached, len(context.tokens))
        context.tokens += self.llama.tokenizer.encode(rest, bos=False, eos=False, within=True)

    def status(self) -> str:
        """The last reply's length and speed, and how much of the context is used."""
        tokens = "1 token" if self.n_new == 1 else f"{self.n_new} tokens"
        used = f"context {len(self.context.tokens)}/{self.limit}"
        return f"{tokens}, {self.llama.timings.new_rate:.1f} tokens/s, {used}"


def certain(text: str, stop: str) -> str:
    """What of a reply may be shown: up to a stop, no part of one, no space that may be last."""
    reply, stopped, _ = text.partition(stop)
    held = () if stopped else (n for n in range(len(stop)) if reply.endswith(stop[:n]))
    return reply[: len(reply) - max(held, default=0)].rstrip()
