"""The LLaMA transformer (arXiv 2302.13971), from its parts to the whole.

Sequences of different lengths are not padded. Their tokens are concatenated into one (n_tokens,
dim) tensor (a packed batch), which every matrix multiplies at once. Only attention splits it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import KVCache


@dataclass
class ModelArgs:
    """The keys of Meta's params.json, and the limits of one run (`max_...`)."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # fewer than n_heads: grouped-query attention (arXiv 2305.13245)
    vocab_size: int = -1
    multiple_of: int = 256
    ffn_dim_multiplier: float = 1.0
    norm_eps: float = 1e-6
    max_batch_size: int = 32
    max_seq_len: int = 512
    rope_theta: float = 10000.0

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward layer.

        2/3 of 4 dim, times ffn_dim_multiplier, rounded up to a multiple of multiple_of.
        """
        width = int(self.ffn_dim_multiplier * int(2 / 3 * 4 * self.dim))
        return self.multiple_of * math.ceil(width / self.multiple_of)


def precompute_freqs_cis(head_dim: int, end: int, theta: float) -> Tensor:
    """exp(i m theta^(-2j / head_dim)) for positions m < end, as complex64 (end, head_dim / 2)."""
    exponents = torch.arange(0, head_dim, 2, device="cpu", dtype=torch.float32) / head_dim
    positions = torch.arange(end, device="cpu", dtype=torch.float32)
    angles = torch.outer(positions, 1 / theta**exponents)  # rounded as in Meta's code
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate each pair (x[2j], x[2j+1]) by its position's angle (arXiv 2104.09864, eq. 34).

    x: (n_tokens, n_heads, head_dim); freqs_cis: (n_tokens, head_dim / 2).
    """
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs_cis[:, None]).view(x.shape).type_as(x)


class Segment(NamedTuple):
    """The tokens of one sequence in a forward pass."""

    start_pos: int
    n_tokens: int
    cache: KVCache | None = None  # None: start_pos is 0, and keys and values are not kept


class Attention(nn.Module):
    def __init__(self, layer_id: int, args: ModelArgs):
        super().__init__()
        self.layer_id = layer_id
        self.head_dim = args.head_dim
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x: Tensor, freqs_cis: Tensor, segments: Sequence[Segment]) -> Tensor:
        shape = (len(x), -1, self.head_dim)
        xq, xk, xv = self.wq(x).view(shape), self.wk(x).view(shape), self.wv(x).view(shape)
        rotated = apply_rotary_emb(torch.cat([xq, xk], 1), freqs_cis)
        xq, xk = rotated.split([xq.shape[1], xk.shape[1]], 1)  # (n_tokens, n_heads, head_dim)

        sizes = [segment.n_tokens for segment in segments]
        sequences = zip(xq.split(sizes), xk.split(sizes), xv.split(sizes), segments)
        output = torch.cat([self.attend(*sequence) for sequence in sequences])
        return self.wo(output.flatten(1))

    def attend(self, xq: Tensor, xk: Tensor, xv: Tensor, segment: Segment) -> Tensor:
        """Attention within one sequence, (n_tokens, n_heads, head_dim) like xq."""
        start_pos, n_tokens, cache = segment
        if cache is not None:
            cache.update(self.layer_id, start_pos, xk, xv)
        if start_pos > 0:
            return cache.attend(self.layer_id, xq, start_pos + n_tokens)
        xq, xk, xv = (x.transpose(0, 1)[None] for x in (xq, xk, xv))
        output = F.scaled_dot_product_attention(xq, xk, xv, is_causal=True, enable_gqa=True)
        return output[0].transpose(0, 1)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)).mul_(self.w3(x)))


class TransformerBlock(nn.Module):
    def __init__(self, layer_id: int, args: ModelArgs):
        super().__init__()
        self.attention = Attention(layer_id, args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = nn.RMSNorm(args.dim, args.norm_eps)  # arXiv 1910.07467, eq. 4
        self.ffn_norm = nn.RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, freqs_cis: Tensor, segments: Sequence[Segment]) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freqs_cis, segments)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """The model: token ids in, logits out.

    Args:
        args: Its hyperparameters. The embedding is uninitialized until a state dict is loaded.

    Attributes:
        caches: The key-value caches of the last call of `forward`.
        cache_dtype: The dtype of new caches.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.caches: Sequence[KVCache] = ()
        self.cache_dtype = torch.get_default_dtype()
        # On the meta device nn.Embedding(...) imports torch._dynamo, which takes a second.
        embeddings = torch.empty(args.vocab_size, args.dim)
        self.tok_embeddings = nn.Embedding.from_pretrained(embeddings, freeze=False)
        self.layers = nn.ModuleList(TransformerBlock(i, args) for i in range(args.n_layers))
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.freqs_cis = precompute_freqs_cis(args.head_dim, args.max_seq_len, args.rope_theta)

    def new_cache(self, length: int) -> KVCache:
        """An empty cache for one sequence, with space for `length` positions."""
        args = self.args
        return KVCache(args.n_layers, args.n_kv_heads, args.head_dim, length, self.cache_dtype)

    def cache_bytes(self, length: int) -> int:
        """Memory of a cache for `length` positions, in bytes."""
        with torch.device("meta"):
            cache = self.new_cache(length)
        return cache.keys.nbytes + cache.values.nbytes

    @torch.inference_mode()
    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        """Logits of the last position of each sequence.

        Args:
            tokens: int64 (bsz, seqlen).
            start_pos: The position of the first token. 0 begins new sequences; otherwise the
                tokens continue those of the previous call.
        Returns:
            fp32 (bsz, vocab_size).
        Raises:
            ValueError: A position is not below `args.max_seq_len`, or there are no such sequences.
        """
        if start_pos == 0:
            self.caches = [self.new_cache(self.args.max_seq_len) for _ in tokens]
        if len(self.caches) != len(tokens):
            raise ValueError("tokens must continue the sequences of the previous call")
        segments = [Segment(start_pos, tokens.shape[1], cache) for cache in self.caches]
        hidden = self.hidden(tokens.flatten(), segments).unflatten(0, tokens.shape)
        return self.output(hidden[:, -1]).float()

    def hidden(self, tokens: Tensor, segments: Sequence[Segment]) -> Tensor:
        """The normalized hidden state of every token.

        Args:
            tokens: int64 (n_tokens,), the ids of all segments, one after another.
            segments: Where each sequence's tokens start, how many they are, and its cache, to which
                they are added.
        Returns:
            (n_tokens, dim), in the activations' dtype.
        """
        if any(s.start_pos + s.n_tokens > self.args.max_seq_len for s in segments):
            raise ValueError(f"max_seq_len is {self.args.max_seq_len}: no more positions")
        freqs_cis = torch.cat([self.freqs_cis[s.start_pos :][: s.n_tokens] for s in segments])
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h, freqs_cis, segments)
        return self.norm(h)

    @torch.inference_mode()
    def evict(self, cache: KVCache, start: int, end: int, length: int) -> None:
        """Remove positions start to end from a cache of `length` positions; the rest moves down.

        Attention depends only on the distance between positions (arXiv 2104.09864, eq. 16), so
        each key is rotated back by end - start positions.
        """
        back = self.freqs_cis[end - start].conj()[None]  # (1, head_dim / 2)
        for layer_id in range(self.args.n_layers):
            keys, values = cache.read(layer_id, end, length)
            cache.update(layer_id, start, apply_rotary_emb(keys, back), values)
