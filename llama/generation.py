"""From prompts to text: prefill and the decoding loop."""

import math
import operator
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile

import torch
from torch import Tensor
from tqdm import tqdm

from .cache import KVCache
from .errors import UserError, check
from .lookup import PromptLookup
from .model import Segment, Transformer
from .sampling import Sampling, sample
from .system import WORKING_MEMORY, available_memory, free_cores
from .tokenizer import Tokenizer

PREFILL_TOKENS = 512  # in one forward pass: enough for full speed, few enough for small activations


@dataclass
class SequenceState:
    """One sequence of tokens, and the cache that holds the first `n_cached` of them.

    Attributes:
        uniforms: A random number from 0 to 1 for each token that may still be drawn, fp64. A token
            always gets the same one, so batching and prompt lookup change the text only where they
            change the rounding of a probability: rarely in fp32, often in int8 and int4.
    """

    tokens: list[int]
    cache: KVCache
    lookup: PromptLookup
    uniforms: Tensor
    n_cached: int = 0


@dataclass
class Timings:
    """Tokens and seconds. The first pass counts as part of the prompt.

    `new_passes`: the passes after it, counted for each sequence of a batch.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    new_passes: int = 0
    new_seconds: float = 0.0
    stopped_at: str = ""  # the limit that ended a sequence, if one did

    @property
    def new_rate(self) -> float:
        """Generated tokens a second."""
        return self.new_tokens / max(self.new_seconds, 1e-9)

    def __str__(self) -> str:
        prompt_rate = self.prompt_tokens / max(self.prompt_seconds, 1e-9)
        per_pass = self.new_tokens / max(self.new_passes, 1)
        text = f"prompt {prompt_rate:.1f} tokens/s" if self.prompt_tokens else "nothing generated"
        text += f", generated {self.new_rate:.1f} tokens/s" if self.new_tokens else ""
        text += f" ({per_pass:.1f} for each pass)" if per_pass > 1.05 else ""
        return text + (f", stopped at {self.stopped_at}" if self.stopped_at else "")


def check_length(name: str, length: int, limit: int) -> None:
    """Raise UserError if a part of the context leaves no room for a new token."""
    if length >= limit:
        raise UserError(
            f"{name} is {length} tokens long and the context {limit}: shorten it, or set "
            f"`max_seq_len` above {length}"
        )


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common, from the first on."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


class LLaMA:
    """A model with its tokenizer.

    Args:
        model, tokenizer: As `llama.load` makes them.
        chat_style: Name of the prompt format that the model was trained on, one of `llama.STYLES`;
            "unknown" if its folder has a chat template that is none of them.

    Attributes:
        timings: Speed of the last `generate` or `stream`.
        weight_bytes: Memory that the weights take, under torchrun those of this rank.
        max_threads: If set, forward passes use as many threads as other programs leave cores, at
            most this number; they are counted once a second. All threads wait for one that has no
            core: beside one busy program, one thread decodes 12 tokens/s and two 5 (int8, 953M
            parameters, two cores). Their number may change the rounding of int8 and int4.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, chat_style: str = "dialog"):
        self.model = model
        self.chat_style = chat_style
        self.tokenizer = tokenizer
        self.timings = Timings()
        self.max_threads: int | None = None
        self.cores_counted_at = -math.inf
        tensors = chain(model.parameters(), model.buffers())
        self.weight_bytes = sum(tensor.nbytes for tensor in tensors)

    def __repr__(self) -> str:
        args, dtype = self.model.args, self.model.norm.weight.dtype
        return (
            f"LLaMA({args.n_layers} layers, dim {args.dim}, {self.weight_bytes / 1e6:,.0f} MB, "
            f"{str(dtype).removeprefix('torch.')} activations, context {args.max_seq_len})"
        )

    def generate(
        self,
        prompts: str | Sequence[str],
        max_gen_len: int = 256,
        temperature: float = 0.8,
        top_p: float = 0.95,
        **options: float | None,
    ) -> list[str]:
        """Continue one or several prompts.

        Args:
            prompts: A text, or several texts or lists of token ids. They run in batches of
                max_batch_size, or of as many as fit in memory.
            max_gen_len, temperature, top_p, options: See `llama.Sampling`.
        Returns:
            Each prompt with its continuation.
        Raises:
            UserError: A prompt fills the context, or an option is out of range.
            TypeError: An option is unknown.
        """
        sampling = Sampling(max_gen_len, temperature, top_p, **options)
        check(isinstance(prompts, Iterable), "prompts", "a text or several", prompts)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        encoded = [self.encode(prompt) for prompt in prompts]
        self.timings = Timings()
        args, generator, texts = self.model.args, sampling.generator(), []
        longest = min(max(map(len, encoded), default=1) + max_gen_len, args.max_seq_len)
        n_fitting = (available_memory() - WORKING_MEMORY) // self.model.cache_bytes(longest)
        batch_size = max(min(args.max_batch_size, n_fitting), 1)
        if torch.distributed.is_initialized():  # all ranks run the same batches
            smallest = torch.tensor(batch_size)
            torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
            batch_size = int(smallest)
        for start in range(0, len(encoded), batch_size):
            batch = encoded[start : start + batch_size]
            sequences = [self.new_sequence(tokens, sampling, generator) for tokens in batch]
            total = max_gen_len * len(batch)
            with tqdm(desc="generating", total=total, unit=" tokens", disable=None) as bar:
                for tokens in self.extend(sequences, sampling):
                    bar.update(len(tokens))
            texts += [self.tokenizer.decode(sequence.tokens) for sequence in sequences]
            del sequences  # their caches, before the next ones are made
        return texts

    def stream(
        self,
        prompt: str | Sequence[int],
        max_gen_len: int = 256,
        temperature: float = 0.8,
        top_p: float = 0.95,
        **options: float | None,
    ) -> Iterator[str]:
        """Continue one prompt, a text or token ids, piece by piece.

        The pieces of the prompt come first. All pieces join to the text that `generate` returns.
        Arguments and errors are those of `generate`.
        """
        sampling = Sampling(max_gen_len, temperature, top_p, **options)
        tokens = self.encode(prompt)
        self.timings = Timings()
        sequence = self.new_sequence(tokens, sampling, sampling.generator())
        new = chain.from_iterable(self.extend([sequence], sampling))
        return self.tokenizer.decode_stream(chain(tokens, new))

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The ids of a prompt; a text gets <s>. Raises UserError if it fills the context."""
        limit, n_words = self.model.args.max_seq_len, self.tokenizer.n_words
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt, bos=True, eos=False)
        else:
            try:
                tokens = [operator.index(t) for t in ([] if isinstance(prompt, bytes) else prompt)]
            except TypeError:
                tokens = []
            good = len(tokens) > 0 and 0 <= min(tokens) and max(tokens) < n_words
            check(good, "prompt", f"a text or token ids from 0 to {n_words - 1}", prompt)
        check_length("the prompt", len(tokens), limit)
        return tokens

    def new_sequence(
        self, tokens: list[int], sampling: Sampling, generator: torch.Generator
    ) -> SequenceState:
        """A sequence of these tokens, with a cache large enough for prompt and continuation."""
        length = min(len(tokens) + sampling.max_gen_len, self.model.args.max_seq_len)
        cache, lookup = self.model.new_cache(length), PromptLookup(sampling.prompt_lookup)
        return SequenceState([*tokens], cache, lookup, sampling.uniforms(generator))

    def extend(self, sequences: Sequence[SequenceState], sampling: Sampling) -> Iterator[list[int]]:
        """Append new tokens to the sequences, and yield them after each forward pass.

        A sequence ends at an end-of-sequence token, which is not appended, after as many tokens as
        it has `uniforms`, or when it is max_seq_len tokens long.
        """
        timings, limit = self.timings, self.model.args.max_seq_len
        begin = time.perf_counter()
        sequences = [sequence for sequence in sequences if len(sequence.uniforms)]
        ends = [len(sequence.tokens) + len(sequence.uniforms) for sequence in sequences]
        for sequence in sequences:
            sequence.n_cached = min(sequence.n_cached, len(sequence.tokens) - 1)
        n_prompt = sum(len(sequence.tokens) - sequence.n_cached for sequence in sequences)
        self.prefill(sequences, n_prompt)
        while active := [s for s in sequences if len(s.uniforms) and len(s.tokens) < limit]:
            new = list(chain.from_iterable(self.step(active, sampling)))
            seconds = time.perf_counter() - begin
            if n_prompt:
                timings.prompt_tokens += n_prompt
                timings.prompt_seconds += seconds
                n_prompt = 0
            else:
                timings.new_tokens += len(new)
                timings.new_passes += len(active)
                timings.new_seconds += seconds
            yield new
            begin = time.perf_counter()
        for sequence, end in zip(sequences, ends):
            if len(sequence.tokens) >= limit:
                timings.stopped_at = f"`max_seq_len={limit}`"
            elif len(sequence.tokens) == end:
                timings.stopped_at = f"`max_gen_len={sampling.max_gen_len}`"

    @torch.inference_mode()
    def prefill(self, sequences: Sequence[SequenceState], n_tokens: int) -> None:
        """Run all but PREFILL_TOKENS of the n_tokens that the caches lack; `step` runs the rest."""
        # The bar appears if the prefill takes more than 2 seconds.
        options = {"unit": " tokens", "delay": 2, "leave": False, "disable": None}
        with tqdm(desc="reading", total=n_tokens, **options) as bar:
            for sequence in sequences:
                while n_tokens > PREFILL_TOKENS and len(sequence.tokens) - sequence.n_cached > 1:
                    chunk = sequence.tokens[sequence.n_cached : -1][:PREFILL_TOKENS]
                    self.feed([sequence], [chunk])
                    sequence.n_cached += len(chunk)
                    n_tokens -= len(chunk)
                    bar.update(len(chunk))

    @torch.inference_mode()
    def step(self, sequences: Sequence[SequenceState], sampling: Sampling) -> list[list[int]]:
        """One forward pass over the tokens that the caches lack, and drafts of the next ones.

        Returns:
            Each sequence's new tokens, which are appended to it: the accepted tokens of its draft,
            and one more.
        """
        limit = self.model.args.max_seq_len
        most = [min(len(s.uniforms), limit - len(s.tokens)) - 1 for s in sequences]
        drafts = [s.lookup.draft(s.tokens)[:n] for s, n in zip(sequences, most)]
        sizes = [len(draft) + 1 for draft in drafts]
        chunks = [[*s.tokens[s.n_cached :], *draft] for s, draft in zip(sequences, drafts)]
        hidden = self.feed(sequences, chunks).split([len(chunk) for chunk in chunks])
        rows = torch.cat([states[-size:] for states, size in zip(hidden, sizes)])
        logits = self.model.output(rows).float()[:, : self.tokenizer.n_words]

        uniforms = torch.cat([s.uniforms[:size] for s, size in zip(sequences, sizes)])
        pairs = list(zip(sequences, drafts))
        preceding = (s.tokens + draft[:n] for s, draft in pairs for n in range(len(draft) + 1))
        drawn = sample(logits, preceding, uniforms, sampling)
        if torch.distributed.is_initialized():  # CPUs may differ in the last bit of a probability
            torch.distributed.broadcast(drawn, 0)
        return [self.accept(*pair, d.tolist()) for pair, d in zip(pairs, drawn.split(sizes))]

    def feed(self, sequences: Sequence[SequenceState], chunks: Sequence[Sequence[int]]) -> Tensor:
        """Add a chunk of tokens to each sequence's cache; returns their hidden states."""
        now = time.monotonic()
        if self.max_threads and now - self.cores_counted_at > 1:
            torch.set_num_threads(min(free_cores(), self.max_threads))
            self.cores_counted_at = now
        pairs = zip(sequences, chunks)
        segments = [Segment(s.n_cached, len(chunk), s.cache) for s, chunk in pairs]
        return self.model.hidden(torch.tensor([*chain.from_iterable(chunks)]), segments)

    def accept(self, sequence: SequenceState, draft: Sequence[int], drawn: list[int]) -> list[int]:
        """Append the drawn tokens up to the first that differs from the draft; returns them.

        The next pass overwrites the keys and values of rejected tokens.
        """
        n_accepted = common_length(draft, drawn)
        new = list(takewhile(lambda t: t not in self.tokenizer.eos_ids, drawn[: n_accepted + 1]))
        is_end = len(new) <= n_accepted
        sequence.n_cached = len(sequence.tokens) + min(n_accepted, len(new))
        sequence.tokens += new
        sequence.uniforms = sequence.uniforms[:0] if is_end else sequence.uniforms[len(new) :]
        sequence.lookup.adapt(len(draft), n_accepted)
        return new
