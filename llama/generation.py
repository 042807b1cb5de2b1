"""From prompts to text: prefill, the decoding loop, sampling."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from .errors import UserError
from .model import KVCache, Transformer
from .tokenizer import Tokenizer

PREFILL_TOKENS = 512  # a forward pass: enough for full speed, few enough for small activations


@dataclass
class Context:
    """One sequence: its tokens, and the cache that holds the first n_cached of them."""

    tokens: list[int]
    cache: KVCache
    n_cached: int = 0
    logits: Tensor | None = None  # (vocab_size,), after the last token fed


@dataclass
class Timings:
    """Tokens fed and the seconds it took: prompts, many at a time; new tokens, one by one."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    new_seconds: float = 0.0

    def __str__(self) -> str:
        prompt_rate = self.prompt_tokens / max(self.prompt_seconds, 1e-9)
        new_rate = self.new_tokens / max(self.new_seconds, 1e-9)
        return f"prompt {prompt_rate:.1f} tokens/s, generated {new_rate:.1f} tokens/s"


class LLaMA:
    def __init__(self, model: Transformer, tokenizer: Tokenizer):
        self.model = model
        self.tokenizer = tokenizer
        self.timings = Timings()

    def generate(
        self,
        prompts: Sequence[str],
        max_gen_len: int,
        temperature: float = 0.8,
        top_p: float = 0.95,
        seed: int | None = None,
    ) -> list[str]:
        """Each prompt with its continuation of at most max_gen_len tokens.

        temperature 0 takes the most probable token each time; otherwise tokens are drawn from the
        nucleus `top_p`, reproducibly with a seed. `timings` tells afterwards how fast it went.
        """
        self.timings = Timings()
        generator = seeded(seed)
        sequences = [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
        for tokens in sequences:
            self.check_length(tokens)
        batch_size = self.model.args.max_batch_size
        texts = []
        for start in range(0, len(sequences), batch_size):
            contexts = [
                self.context(tokens, max_gen_len) for tokens in sequences[start:][:batch_size]
            ]
            steps = self.extend(contexts, max_gen_len, temperature, top_p, generator)
            for _ in tqdm(steps, "generating", max_gen_len, unit="token", disable=None):
                pass
            texts += [self.tokenizer.decode(context.tokens) for context in contexts]
        return texts

    def check_length(self, tokens: Sequence[int]) -> None:
        limit = self.model.args.max_seq_len
        if len(tokens) >= limit:
            raise UserError(
                f"the prompt is {len(tokens)} tokens long and the context {limit}: "
                f"shorten the prompt, or give a --max_seq_len above {len(tokens)}"
            )

    def context(self, tokens: Sequence[int], max_gen_len: int) -> Context:
        """A sequence that begins with these tokens, and a cache for all that it may become."""
        length = min(len(tokens) + max_gen_len, self.model.args.max_seq_len)
        return Context(list(tokens), self.model.new_cache(length))

    def extend(
        self,
        contexts: Sequence[Context],
        max_gen_len: int,
        temperature: float,
        top_p: float,
        generator: torch.Generator,
    ) -> Iterator[None]:
        """Append new tokens to the contexts, one to each at every step.

        A context stays as it is from its end-of-sequence token on, which is not appended, or when
        it has reached max_seq_len; when all do, this ends.
        """
        timings = self.timings
        for n_steps in range(max_gen_len):
            begin = time.perf_counter()
            n_fed = sum(len(context.tokens) - context.n_cached for context in contexts)
            logits = self.advance(contexts)
            tokens = sample(logits, temperature, top_p, generator).tolist()
            seconds = time.perf_counter() - begin
            if n_steps == 0:
                timings.prompt_tokens += n_fed
                timings.prompt_seconds += seconds
            else:
                timings.new_tokens += n_fed
                timings.new_seconds += seconds

            going_on = []
            for context, token in zip(contexts, tokens):
                if token != self.tokenizer.eos_id:
                    context.tokens.append(token)
                    going_on.append(context)
            yield
            limit = self.model.args.max_seq_len
            contexts = [context for context in going_on if len(context.tokens) < limit]
            if not contexts:
                return

    def advance(self, contexts: Sequence[Context]) -> Tensor:
        """Feed each cache what it lacks: the logits after each last token, (bsz, vocab_size)."""
        while True:
            room, pieces = PREFILL_TOKENS, []
            for context in contexts:
                piece = context.tokens[context.n_cached :][:room]
                if piece:
                    pieces.append((context, piece))
                    room -= len(piece)
            if not pieces:
                return torch.stack([context.logits for context in contexts])
            logits = self.model(
                [torch.tensor(piece) for _, piece in pieces],
                [context.n_cached for context, _ in pieces],
                [context.cache for context, _ in pieces],
            )
            for (context, piece), context.logits in zip(pieces, logits):
                context.n_cached += len(piece)


def seeded(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """A token for each row of (bsz, vocab_size) logits: int64 (bsz,)."""
    if temperature == 0:
        return logits.argmax(-1)
    return sample_top_p(torch.softmax(logits / temperature, -1), top_p, generator)


def sample_top_p(probs: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Draw from the smallest set of most probable tokens whose mass reaches p (1904.09751)."""
    vocab_size = probs.shape[-1]
    for n_best in (256, vocab_size):  # seldom are more than 256 tokens needed, and sorting is slow
        best, tokens = probs.topk(min(n_best, vocab_size))
        if best.sum(-1).min() >= p:
            break
    mass_before = best.cumsum(-1) - best
    best[(mass_before >= p) & (mass_before > 0)] = 0
    return tokens.gather(-1, torch.multinomial(best, 1, generator=generator)).squeeze(-1)
