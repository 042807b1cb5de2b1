"""The LLaMA transformer (arXiv 2302.13971), whole, in the order in which data meets it.

Sequences of different lengths are never padded: their tokens lie one after another in one
(n_tokens, dim) tensor, which every matrix multiplies at once, and only attention, where a token
must see its own sequence alone, takes the sequences apart.
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
    """The keys of Meta's params.json, and the limits of one run."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # fewer: each serves a group of heads (arXiv 2305.13245)
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
        """Width of the feed-forward layer: 2/3 of 4 dim, and up to a multiple of `multiple_of`."""
        width = int(self.ffn_dim_multiplier * int(2 / 3 * 4 * self.dim))
        return self.multiple_of * math.ceil(width / self.multiple_of)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32 (arXiv 1910.07467, eq. 4)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def precompute_freqs_cis(head_dim: int, end: int, theta: float) -> Tensor:
    """exp(i m theta^(-2j / head_dim)) for positions m < end: complex64 (end, head_dim / 2)."""
    exponents = torch.arange(0, head_dim, 2, device="cpu", dtype=torch.float32) / head_dim
    positions = torch.arange(end, device="cpu", dtype=torch.float32)
    angles = torch.outer(positions, 1 / theta**exponents)  # rounded as everyone rounds it
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Turn each pair (x[2j], x[2j+1]) by its position's angle, in fp32 (arXiv 2104.09864, eq. 34).

    x: (n_tokens, n_heads, head_dim); freqs_cis: (n_tokens, head_dim / 2).
    """
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs_cis[:, None]).view(x.shape).type_as(x)


class Segment(NamedTuple):
    """The part of one sequence that a forward pass computes."""

    start_pos: int
    n_tokens: int
    cache: KVCache | None  # None: nothing came before, nothing comes after
    mask: Tensor | None  # (n_tokens, start_pos + n_tokens), where is_causal does not say it


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
        heads = (len(x), -1, self.head_dim)
        xq, xk, xv = self.wq(x).view(heads), self.wk(x).view(heads), self.wv(x).view(heads)
        turned = apply_rotary_emb(torch.cat([xq, xk], 1), freqs_cis)
        xq, xk = turned[:, : xq.shape[1]], turned[:, xq.shape[1] :]  # (n_tokens, n_heads, head_dim)

        if len(segments) == 1:
            output = self.attend(xq, xk, xv, segments[0])
        else:
            sizes = [segment.n_tokens for segment in segments]
            parts = zip(xq.split(sizes), xk.split(sizes), xv.split(sizes), segments)
            output = torch.cat([self.attend(*part) for part in parts])
        return self.wo(output.flatten(-2))

    def attend(self, xq: Tensor, xk: Tensor, xv: Tensor, segment: Segment) -> Tensor:
        """What the tokens of one sequence attend to: (n_tokens, n_heads, head_dim), as xq."""
        start_pos, n_tokens, cache, mask = segment
        if cache is not None:
            cache.update(self.layer_id, start_pos, xk, xv)
            if n_tokens == 1:
                return cache.attend(self.layer_id, xq[0], start_pos + 1)[None]
        if start_pos == 0:
            return attention(xq, xk.transpose(0, 1), xv.transpose(0, 1), mask)
        queries = xq.unflatten(1, (xk.shape[1], -1))  # by the head of keys that serves them
        parts = [
            attention(queries[:, heads].flatten(1, 2), keys, values, mask)
            for heads, keys, values in cache.read(self.layer_id, start_pos + n_tokens)
        ]
        return torch.cat(parts, 1)


def attention(xq: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v: (n_tokens, n_heads, head_dim), as xq; causal, or mask.

    keys, values: (n_kv_heads, start_pos + n_tokens, head_dim), of any dtype.
    """
    output = F.scaled_dot_product_attention(
        xq.transpose(0, 1)[None],
        keys[None].type_as(xq),
        values[None].type_as(xq),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=True,  # without copies of keys and values
    )
    return output[0].transpose(0, 1)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, layer_id: int, args: ModelArgs):
        super().__init__()
        self.attention = Attention(layer_id, args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, freqs_cis: Tensor, segments: Sequence[Segment]) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freqs_cis, segments)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.caches: Sequence[KVCache] = ()
        self.cache_dtype: torch.dtype | None = None  # None: that of the activations
        # Not initialised: on the meta device that would import torch._dynamo, which takes a second.
        embeddings = torch.empty(args.vocab_size, args.dim)
        self.tok_embeddings = nn.Embedding.from_pretrained(embeddings, freeze=False)
        self.layers = nn.ModuleList(TransformerBlock(i, args) for i in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.freqs_cis = precompute_freqs_cis(args.head_dim, args.max_seq_len, args.rope_theta)

    def new_cache(self, length: int) -> KVCache:
        args, dtype = self.args, self.cache_dtype or self.norm.weight.dtype
        return KVCache(args.n_layers, args.n_kv_heads, args.head_dim, length, dtype)

    @torch.inference_mode()
    def drop(self, cache: KVCache, start: int, end: int, length: int) -> None:
        """Forget positions start to end; what follows them, up to length, moves up to start.

        Attention sees only how far apart positions are (arXiv 2104.09864, eq. 16), so that keys
        may move when they are turned back by the angle of as many positions.
        """
        back = self.freqs_cis[end - start].conj()[None]  # (1, head_dim / 2)
        for layer_id in range(self.args.n_layers):
            for heads, keys, values in cache.read(layer_id, length):
                keys = apply_rotary_emb(keys[:, end:], back).transpose(0, 1)
                values = values[:, end:].transpose(0, 1).clone()
                cache.update(layer_id, start, keys, values, heads)

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor | Sequence[Tensor],
        start_pos: int | Sequence[int],
        caches: Sequence[KVCache] | None = None,
    ) -> Tensor:
        """Logits of each sequence's last position: fp32 (bsz, vocab_size).

        tokens: int64 (bsz, seqlen), or bsz one-dimensional tensors of any lengths.
        start_pos: how many tokens of the sequence came before, for all or for each.
        caches: what holds them; without, the model's own, begun anew where all begin at 0.
        """
        starts = [start_pos] * len(tokens) if isinstance(start_pos, int) else start_pos
        if any(start + len(row) > self.args.max_seq_len for start, row in zip(starts, tokens)):
            raise ValueError(f"there are {self.args.max_seq_len} positions: max_seq_len")
        if caches is None:
            if not any(starts):
                self.caches = [self.new_cache(len(row)) for row in tokens]
            caches = self.caches
        h = self.hidden(tokens, starts, caches)
        last = torch.tensor([len(row) for row in tokens]).cumsum(0) - 1
        return self.output(h[last]).float()

    def hidden(
        self,
        tokens: Tensor | Sequence[Tensor],
        starts: Sequence[int],
        caches: Sequence[KVCache | None],
    ) -> Tensor:
        """The normalised state of every token, sequence after sequence: (n_tokens, dim)."""
        segments = []
        for row, start_pos, cache in zip(tokens, starts, caches, strict=True):
            mask = None
            if start_pos > 0 and len(row) > 1:
                mask = torch.ones(len(row), start_pos + len(row), dtype=torch.bool).tril(start_pos)
            segments.append(Segment(start_pos, len(row), cache, mask))
        freqs_cis = torch.cat([self.freqs_cis[s.start_pos :][: s.n_tokens] for s in segments])

        h = self.tok_embeddings(torch.cat(tuple(tokens)))
        for layer in self.layers:
            h = layer(h, freqs_cis, segments)
        return self.norm(h)
