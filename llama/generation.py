"""From prompts to text: prefill and the decoding loop."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from tqdm import tqdm

from .cache import KVCache
from .errors import UserError, check
from .lookup import PromptLookup
from .model import Transformer
from .sampling import Sampling, draw_uniforms, make_sampling, sample
from .tokenizer import Tokenizer

PREFILL_TOKENS = 512  # in one forward pass: enough for full speed, few enough for small activations


@dataclass
class Context:
    """One sequence: its tokens, and the cache that holds the first n_cached of them.

    Attributes:
        n_left: Tokens that may still be generated.
        uniforms: A random number from 0 to 1 for each token to be drawn, fp64 (max_gen_len,).
    """

    tokens: list[int]
    cache: KVCache
    lookup: PromptLookup
    n_cached: int = 0
    n_left: int = 0
    uniforms: Tensor | None = None


@dataclass
class Timings:
    """Counts and seconds of prompt tokens, generated tokens and decoding passes."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    new_passes: int = 0
    new_seconds: float = 0.0

    @property
    def new_rate(self) -> float:
        """Generated tokens a second."""
        return self.new_tokens / max(self.new_seconds, 1e-9)

    def __str__(self) -> str:
        prompt_rate = self.prompt_tokens / max(self.prompt_seconds, 1e-9)
        per_pass = self.new_tokens / max(self.new_passes, 1)
        text = f"prompt {prompt_rate:.1f} tokens/s, generated {self.new_rate:.1f} tokens/s"
        return text + (f" ({per_pass:.1f} a pass)" if per_pass > 1.05 else "")


class LLaMA:
    """A model with its tokenizer.

    Args:
        model: The transformer, with its weights.
        tokenizer: Its tokenizer.
        chat_style: Name of the prompt format that the model was trained on, one of `llama.STYLES`.

    Attributes:
        timings: Speed of the last `generate` or `stream`.
        weight_bytes: Memory that the weights take.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, chat_style: str = "dialog"):
        self.model = model
        self.chat_style = chat_style
        self.tokenizer = tokenizer
        self.timings = Timings()
        tensors = chain(model.parameters(), model.buffers())
        self.weight_bytes = sum(tensor.numel() * tensor.itemsize for tensor in tensors)

    def __repr__(self) -> str:
        args, dtype = self.model.args, self.model.norm.weight.dtype
        return (
            f"LLaMA({args.n_layers} layers, dim {args.dim}, {self.weight_bytes / 1e6:,.0f} MB, "
            f"{str(dtype).removeprefix('torch.')} activations, context {args.max_seq_len})"
        )

    def generate(
        self,
        prompts: str | Sequence[str],
        max_gen_len: int,
        temperature: float = 0.8,
        top_p: float = 0.95,
        **options: float | None,
    ) -> list[str]:
        """Continue one or several prompts.

        Args:
            prompts: Texts. They run in batches of max_batch_size.
            max_gen_len, temperature, top_p, options: See `llama.Sampling`.
        Returns:
            Each prompt with its continuation.
        Raises:
            UserError: A prompt is longer than the context, or an option is unknown or out of range.
        """
        sampling = make_sampling(max_gen_len, temperature, top_p, options)
        check(isinstance(prompts, Iterable), "prompts", "a text or several", prompts)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        sequences = [self.encode(prompt) for prompt in prompts]
        self.timings = Timings()
        generator = sampling.generator()
        batch_size = self.model.args.max_batch_size
        texts = []
        for start in range(0, len(sequences), batch_size):
            batch = sequences[start : start + batch_size]
            contexts = [self.context(tokens, sampling, generator) for tokens in batch]
            total = max_gen_len * len(batch)
            with tqdm(desc="generating", total=total, unit=" tokens", disable=None) as bar:
                for tokens in self.extend(contexts, sampling):
                    bar.update(len(tokens))
            texts += [self.tokenizer.decode(context.tokens) for context in contexts]
        return texts

    def stream(
        self,
        prompt: str | Sequence[int],
        max_gen_len: int,
        temperature: float = 0.8,
        top_p: float = 0.95,
        **options: float | None,
    ) -> Iterator[str]:
        """Continue one prompt, a text or token ids, piece by piece.

        The pieces, of which the prompt is the first, join to what `generate` returns. Arguments and
        errors are those of `generate`.
        """
        sampling = make_sampling(max_gen_len, temperature, top_p, options)
        tokens = self.encode(prompt)
        self.timings = Timings()
        context = self.context(tokens, sampling, sampling.generator())
        new = chain.from_iterable(self.extend([context], sampling))
        return self.tokenizer.decode_stream(chain(tokens, new))

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The ids of a prompt, from <s> on, if it leaves room for a token."""
        limit, vocab_size = self.model.args.max_seq_len, self.tokenizer.n_words
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt, bos=True, eos=False)
        else:
            tokens = prompt.tolist() if isinstance(prompt, Tensor) else prompt
            good = isinstance(tokens, Sequence) and len(tokens) > 0
            good = good and all(type(token) is int and 0 <= token < vocab_size for token in tokens)
            check(good, "prompt", f"a text or token ids from 0 to {vocab_size - 1}", prompt)
            tokens = list(tokens)
        if len(tokens) >= limit:
            raise UserError(
                f"the prompt is {len(tokens)} tokens long and the context {limit}: "
                f"shorten the prompt, or set `max_seq_len` above {len(tokens)}"
            )
        return tokens

    def context(
        self, tokens: Sequence[int], sampling: Sampling, generator: torch.Generator
    ) -> Context:
        """A sequence of these tokens, with a cache large enough for prompt and continuation."""
        length = min(len(tokens) + sampling.max_gen_len, self.model.args.max_seq_len)
        context = Context(
            list(tokens), self.model.new_cache(length), PromptLookup(sampling.prompt_lookup)
        )
        context.uniforms = draw_uniforms(sampling.max_gen_len, generator)
        return context

    def extend(self, contexts: Sequence[Context], sampling: Sampling) -> Iterator[list[int]]:
        """Append new tokens to the contexts, and yield them after each forward pass.

        A context ends at an end-of-sequence token, which is not appended, after max_gen_len tokens,
        or when it is max_seq_len tokens long.
        """
        for context in contexts:
            context.n_left = sampling.max_gen_len
            context.n_cached = min(context.n_cached, len(context.tokens) - 1)
        limit, timings, is_prompt = self.model.args.max_seq_len, self.timings, True
        while active := [c for c in contexts if c.n_left and len(c.tokens) < limit]:
            begin = time.perf_counter()
            n_fed = sum(len(context.tokens) - context.n_cached for context in active)
            guesses = [c.lookup.guess(c.tokens) for c in active]
            rooms = [min(c.n_left, limit - len(c.tokens)) - 1 for c in active]
            guesses = [guess[:room] for guess, room in zip(guesses, rooms)]
            drawn = self.draw(self.advance(active, guesses), active, guesses, sampling)
            new = [self.keep(context, guess, drawn) for context, guess in zip(active, guesses)]
            seconds = time.perf_counter() - begin
            if is_prompt:
                timings.prompt_tokens += n_fed
                timings.prompt_seconds += seconds
                is_prompt = False
            else:
                timings.new_tokens += sum(map(len, new))
                timings.new_passes += len(active)
                timings.new_seconds += seconds
            yield list(chain.from_iterable(new))

    @torch.inference_mode()
    def advance(self, contexts: Sequence[Context], guesses: Sequence[Sequence[int]]) -> Tensor:
        """Feed the tokens that the caches lack, and the guesses after them.

        Returns:
            fp32 logits after each context's last token and each of its guesses: (n_rows, n_words).
        """
        n_missing = sum(len(context.tokens) - context.n_cached for context in contexts)
        # The bar appears where reading the prompt takes more than 2 seconds.
        options = {"delay": 2, "leave": False, "disable": None}
        with tqdm(desc="reading", total=n_missing, unit=" tokens", **options) as bar:
            while True:
                missing = [context.tokens[context.n_cached :] for context in contexts]
                if sum(map(len, missing)) <= max(PREFILL_TOKENS, len(contexts)):
                    break
                room, chunks = PREFILL_TOKENS, []
                for tokens in missing:
                    chunks.append(tokens[:-1][:room])
                    room -= len(chunks[-1])
                self.feed(contexts, chunks)
                for context, chunk in zip(contexts, chunks):
                    context.n_cached += len(chunk)
                    bar.update(len(chunk))
        hidden = self.feed(contexts, [[*m, *guess] for m, guess in zip(missing, guesses)])
        rows, end = [], 0
        for tokens, guess in zip(missing, guesses):
            end += len(tokens) + len(guess)
            rows += range(end - 1 - len(guess), end)
        return self.model.output(hidden[rows]).float()[:, : self.tokenizer.n_words]

    def feed(self, contexts: Sequence[Context], chunks: Sequence[Sequence[int]]) -> Tensor:
        """Add a chunk of tokens to each context's cache; returns their hidden states."""
        fed = [(context, chunk) for context, chunk in zip(contexts, chunks) if chunk]
        return self.model.hidden(
            [torch.tensor(chunk) for _, chunk in fed],
            [context.n_cached for context, _ in fed],
            [context.cache for context, _ in fed],
        )

    def draw(
        self,
        logits: Tensor,
        contexts: Sequence[Context],
        guesses: Sequence[Sequence[int]],
        sampling: Sampling,
    ) -> Iterator[int]:
        """The token that is drawn after each context's last token and each of its guesses."""
        sequences, uniforms = [], []
        for context, guess in zip(contexts, guesses):
            if sampling.repetition_penalty != 1:
                sequences += [[*context.tokens, *guess[:n]] for n in range(len(guess) + 1)]
            first = sampling.max_gen_len - context.n_left
            uniforms.append(context.uniforms[first : first + len(guess) + 1])
        tokens = sample(logits, sequences, torch.cat(uniforms), sampling)
        if torch.distributed.is_initialized():  # sampling may differ in a last bit between CPUs
            torch.distributed.broadcast(tokens, 0)
        return iter(tokens.tolist())

    def keep(self, context: Context, guess: Sequence[int], drawn: Iterator[int]) -> list[int]:
        """Append the drawn tokens up to the first that was not guessed, and return them.

        Cache entries after the first wrong guess are discarded.
        """
        new, n_right, going_on = [], 0, True
        for token, guessed in zip([next(drawn) for _ in range(len(guess) + 1)], [*guess, None]):
            if going_on and token in self.tokenizer.eos_ids:
                context.n_left, going_on = 0, False
            if going_on:
                new.append(token)
                n_right += token == guessed
                going_on = token == guessed
        context.n_cached = len(context.tokens) + n_right
        context.tokens += new
        context.n_left = max(context.n_left - len(new), 0)
        context.lookup.learn(len(guess), n_right)
        return new
