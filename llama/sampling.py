"""How the next token is drawn from the model's logits."""

import math
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UserError, check


@dataclass(frozen=True)
class Sampling:
    """How far a sequence is continued, and how its tokens are drawn.

    Args:
        max_gen_len: Maximum number of tokens to generate for a prompt or a message.
        temperature: 0 takes the most probable token each time; higher is more surprising.
        top_p: Draw from the most probable tokens that together have this probability, 0 to 1.
        top_k: Draw only from the top_k most probable tokens. None or 0: no limit.
        repetition_penalty: Above 1, tokens that the sequence has already become less probable.
        seed: The same seed draws the same tokens. None: different ones each time.
        prompt_lookup: Maximum number of tokens to draft from the context for a forward pass. 0: no
            drafts. It changes the speed, not the distribution of the text.
    """

    max_gen_len: int = 256
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    prompt_lookup: int = 16

    def __post_init__(self):
        for name, kind in typing.get_type_hints(Sampling).items():
            kinds = (*(typing.get_args(kind) or (kind,)), *((int,) if kind is float else ()))
            expected = getattr(kind, "__name__", str(kind))
            check(type(getattr(self, name)) in kinds, name, expected, getattr(self, name))
        t, p, k, penalty = self.temperature, self.top_p, self.top_k, self.repetition_penalty
        n, seed = self.max_gen_len, self.seed
        check(0 <= n <= 2**20, "max_gen_len", "an integer from 0 to 1048576", n)
        check(0 <= t < math.inf, "temperature", "0 or more", t)
        check(0 <= p <= 1, "top_p", "a number from 0 to 1", p)
        check(k is None or k >= 0, "top_k", "0 (off) or more", k)
        check(1e-9 <= penalty <= 1e9, "repetition_penalty", "a number from 1e-9 to 1e9", penalty)
        check(0 <= (seed or 0) < 2**63, "seed", "an integer from 0 to 2**63 - 1", seed)
        check(0 <= self.prompt_lookup <= 64, "prompt_lookup", "0 to 64 tokens", self.prompt_lookup)

    def generator(self) -> torch.Generator:
        """The source of random numbers for one call of `generate`, or one chat."""
        generator = torch.Generator()
        return generator.manual_seed(generator.seed() if self.seed is None else self.seed)

    def uniforms(self, generator: torch.Generator) -> Tensor:
        """A random number from 0 to 1 for each of max_gen_len tokens, fp64."""
        return torch.rand(self.max_gen_len, generator=generator, dtype=torch.float64)


def sample(
    logits: Tensor, sequences: Iterable[Sequence[int]], uniforms: Tensor, sampling: Sampling
) -> Tensor:
    """Draw a token for each row of logits.

    Args:
        logits: fp32 (n_rows, n_words).
        sequences: The tokens that precede each row's, for the repetition penalty.
        uniforms: A random number from 0 to 1 for each row, (n_rows,).
    Returns:
        int64 (n_rows,).
    Raises:
        UserError: A logit is not finite.
    """
    if sampling.repetition_penalty != 1:
        logits = penalize(logits, sequences, sampling.repetition_penalty)
    if not logits.isfinite().all():
        raise UserError(
            "the model's output is not finite: its weights are damaged, or of another params.json"
        )
    if sampling.temperature < 1e-5:  # 0, or so near to it that dividing would overflow
        return logits.argmax(-1)
    if sampling.top_k:
        best = logits.topk(min(sampling.top_k, logits.shape[-1])).values
        logits = logits.masked_fill(logits < best[:, -1:], -math.inf)
    temperature = min(sampling.temperature, 1e30)  # more would be Inf in fp32
    probs = torch.softmax((logits - logits.amax(-1, True)) / temperature, -1)
    return sample_top_p(probs, sampling.top_p, uniforms)


def penalize(logits: Tensor, sequences: Iterable[Sequence[int]], penalty: float) -> Tensor:
    """Divide the logits of tokens that a sequence has by the penalty (arXiv 1909.05858, 4.1).

    A negative logit is multiplied, as in transformers: dividing would make it more probable.
    """
    logits = logits.clone()
    for row, tokens in zip(logits, sequences):
        seen = row[tokens]
        row[tokens] = torch.where(seen > 0, seen / penalty, seen * penalty)
    return logits


def sample_top_p(probs: Tensor, p: float, uniforms: Tensor) -> Tensor:
    """Draw from the smallest set of most probable tokens of mass p (arXiv 1904.09751)."""
    vocab_size = probs.shape[-1]
    for n_best in (256, vocab_size):  # more than 256 are rarely needed, and sorting is slow
        best, tokens = probs.topk(min(n_best, vocab_size))
        if best.sum(-1).min() >= p:
            break
    mass_before = best.cumsum(-1) - best
    best[:, 1:][mass_before[:, 1:] >= p] = 0  # the most probable one stays, even if p is 0
    cumulative = best.double().cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    last = (best > 0).sum(-1, keepdim=True) - 1
    return tokens.gather(-1, torch.minimum(drawn, last)).squeeze(-1)
