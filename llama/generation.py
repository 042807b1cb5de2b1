"""From prompts to text: prefill, the decoding loop, sampling."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from tqdm import tqdm

from .cache import KVCache
from .errors import UserError, require
from .model import Transformer
from .parallel import agreed
from .tokenizer import Tokenizer

PREFILL_TOKENS = 512  # a forward pass: enough for full speed, few enough for small activations


@dataclass(frozen=True)
class Sampling:
    """How far a sequence is continued, and how its tokens are drawn."""

    max_gen_len: int  # tokens
    temperature: float = 0.8  # 0: the most probable token each time
    top_p: float = 0.95  # draw from the most probable tokens that have this mass together
    top_k: int | None = None  # ... of the k most probable alone
    repetition_penalty: float = 1.0  # above 1: tokens that are there already become less probable
    seed: int | None = None  # the same seed draws the same tokens

    def __post_init__(self):
        t, p, k, penalty = self.temperature, self.top_p, self.top_k, self.repetition_penalty
        require(self.max_gen_len >= 0, "max_gen_len", "0 or more tokens", self.max_gen_len)
        require(0 <= t < math.inf, "temperature", "a number from 0 on", t)
        require(0 <= p <= 1, "top_p", "a number from 0 to 1", p)
        require(k is None or k >= 0, "top_k", "a whole number from 0 (off) on", k)
        require(1e-9 <= penalty <= 1e9, "repetition_penalty", "1e-9 to 1e9", penalty)
        require(abs(self.seed or 0) < 2**63, "seed", "a whole number of up to 18 digits", self.seed)

    def generator(self) -> torch.Generator:
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


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

    @property
    def new_rate(self) -> float:
        return self.new_tokens / max(self.new_seconds, 1e-9)

    def __str__(self) -> str:
        prompt_rate = self.prompt_tokens / max(self.prompt_seconds, 1e-9)
        return f"prompt {prompt_rate:.1f} tokens/s, generated {self.new_rate:.1f} tokens/s"


class LLaMA:
    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, plan: Mapping[str, str] | None = None
    ):
        """plan: how each form of weight is multiplied, in words."""
        self.model = model
        self.tokenizer = tokenizer
        self.plan = plan or {}
        self.weight_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
        self.timings = Timings()

    def generate(
        self,
        prompts: Sequence[str],
        max_gen_len: int,
        temperature: float = 0.8,
        top_p: float = 0.95,
        **options: float | None,
    ) -> list[str]:
        """Each prompt with its continuation of at most max_gen_len tokens; options: see Sampling.

        `timings` tells afterwards how fast it went.
        """
        self.timings = Timings()
        sampling = Sampling(max_gen_len, temperature, top_p, **options)
        generator = sampling.generator()
        sequences = [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
        for tokens in sequences:
            self.check_length(tokens)
        batch_size = self.model.args.max_batch_size
        texts = []
        for start in range(0, len(sequences), batch_size):
            contexts = [
                self.context(tokens, max_gen_len) for tokens in sequences[start:][:batch_size]
            ]
            steps = self.extend(contexts, sampling, generator)
            for _ in tqdm(steps, "generating", max_gen_len, unit="token", disable=None):
                pass
            texts += [self.tokenizer.decode(context.tokens) for context in contexts]
        return texts

    def stream(
        self,
        prompt_tokens: Sequence[int],
        max_gen_len: int,
        temperature: float = 0.8,
        top_p: float = 0.95,
        **options: float | None,
    ) -> Iterator[str]:
        """The prompt, then its continuation as it comes: pieces of what `generate` returns."""
        self.timings = Timings()
        sampling = Sampling(max_gen_len, temperature, top_p, **options)
        self.check_length(prompt_tokens)
        context = self.context(prompt_tokens, max_gen_len)
        steps = self.extend([context], sampling, sampling.generator())
        return self.tokenizer.decode_stream(chain(prompt_tokens, chain.from_iterable(steps)))

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
        sampling: Sampling,
        generator: torch.Generator,
    ) -> Iterator[list[int]]:
        """Append new tokens to the contexts, one to each at every step: yields these.

        A context stays as it is from its end-of-sequence token on, which is not appended, or when
        it has reached max_seq_len; when all do, this ends.
        """
        timings = self.timings
        for n_steps in range(sampling.max_gen_len):
            begin = time.perf_counter()
            n_fed = sum(len(context.tokens) - context.n_cached for context in contexts)
            logits = self.advance(contexts)[:, : self.tokenizer.n_words]  # what is past is padding
            sequences = [context.tokens for context in contexts]
            tokens = agreed(sample(logits, sequences, sampling, generator))
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
            yield [context.tokens[-1] for context in going_on]
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


def sample(
    logits: Tensor,
    sequences: Sequence[Sequence[int]],
    sampling: Sampling,
    generator: torch.Generator,
) -> Tensor:
    """The token after each sequence, given its row of (bsz, vocab_size) logits: int64 (bsz,)."""
    if sampling.repetition_penalty != 1:
        logits = penalize(logits, sequences, sampling.repetition_penalty)
    if not logits.isfinite().all():
        raise UserError(
            "the model's output is not finite: its weights are damaged, or not params.json's"
        )
    if sampling.temperature < 1e-5:  # 0, or so near to it that dividing would overflow
        return logits.argmax(-1)
    if sampling.top_k:
        best = logits.topk(min(sampling.top_k, logits.shape[-1])).values
        logits = logits.masked_fill(logits < best[:, -1:], -math.inf)
    temperature = min(sampling.temperature, 1e30)  # more would be Inf in fp32
    probs = torch.softmax((logits - logits.amax(-1, True)) / temperature, -1)
    return sample_top_p(probs, sampling.top_p, generator)


def penalize(logits: Tensor, sequences: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Logits less by the penalty for tokens that a sequence has (arXiv 1909.05858, section 4.1).

    As everywhere since, a negative logit is multiplied: dividing it would make it more probable.
    """
    logits = logits.clone()
    for row, tokens in zip(logits, sequences):
        there = row[list(tokens)]
        row[list(tokens)] = torch.where(there > 0, there / penalty, there * penalty)
    return logits


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
