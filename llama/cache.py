"""The key-value cache of one sequence, and attention to it.

With p = softmax(q K^T / sqrt(head_dim)), attention is p V. For few tokens, q K^T and p V are
weighted sums of rows: of K^T by q, and of V by p. `torch.embedding_bag` computes them at memory
bandwidth. For one token, scaled_dot_product_attention takes 2 to 10 times as long on AMD Zen 5. On
an Intel Xeon it takes the same time in bf16, and twice the time in fp16, the cache's dtype for
quantized weights. There, matmul takes 7 times as long, and for 8 tokens without AVX-512 25 times.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

KEY_BLOCK = 64  # positions in a block of keys
FEW_TOKENS = 16  # up to here sums of rows are faster than matrix products


class KVCache:
    """Keys and values of every layer, for `length` positions of one sequence.

    Attributes:
        keys: K^T in blocks of positions, (n_layers, n_blocks, n_kv_heads, head_dim, KEY_BLOCK).
        values: V, (n_layers, n_kv_heads, n_blocks * KEY_BLOCK, head_dim).
    """

    def __init__(
        self, n_layers: int, n_kv_heads: int, head_dim: int, length: int, dtype: torch.dtype
    ):
        n_blocks = math.ceil(length / KEY_BLOCK)
        self.keys = torch.empty(n_layers, n_blocks, n_kv_heads, head_dim, KEY_BLOCK, dtype=dtype)
        self.values = torch.empty(n_layers, n_kv_heads, n_blocks * KEY_BLOCK, head_dim, dtype=dtype)
        self.indices_for, self.indices = (0, 0), []

    def update(self, layer_id: int, start_pos: int, xk: Tensor, xv: Tensor) -> None:
        """Store keys and values, (n_tokens, n_kv_heads, head_dim), from start_pos on."""
        end = start_pos + len(xk)
        for block in range(start_pos // KEY_BLOCK, math.ceil(end / KEY_BLOCK)):
            first = block * KEY_BLOCK - start_pos  # of the block, counted from start_pos
            new, column = xk[max(first, 0) : first + KEY_BLOCK], max(-first, 0)
            self.keys[layer_id, block, :, :, column : column + len(new)] = new.permute(1, 2, 0)
        self.values[layer_id, :, start_pos:end] = xv.transpose(0, 1)

    def read(self, layer_id: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values of some positions, (n_positions, n_kv_heads, head_dim)."""
        positions = torch.arange(start, end)
        keys = self.keys[layer_id][positions // KEY_BLOCK, :, :, positions % KEY_BLOCK]
        return keys.contiguous(), self.values[layer_id, :, start:end].transpose(0, 1).clone()

    def attend(self, layer_id: int, xq: Tensor, end: int) -> Tensor:
        """softmax(q k^T / sqrt(head_dim)) v of the last len(xq) tokens before position `end`.

        xq and the result: (n_tokens, n_heads, head_dim).
        """
        queries = (xq / math.sqrt(xq.shape[2])).transpose(0, 1)
        attend = self.attend_few if len(xq) <= FEW_TOKENS else self.attend_many
        return attend(layer_id, queries, end).transpose(0, 1).type_as(xq)

    def attend_few(self, layer_id: int, queries: Tensor, end: int) -> Tensor:
        """By weighted sums of rows. (n_heads, n_tokens, head_dim), like the queries."""
        n_heads, n_tokens, _ = queries.shape
        key_rows, value_rows = self.row_indices(n_heads, n_tokens, end)
        n_blocks = len(key_rows) // (n_heads * n_tokens)
        by_block = queries.to(self.keys.dtype)[:, None].expand(-1, n_blocks, -1, -1)
        scores = weighted_sums(self.keys[layer_id], key_rows, by_block)
        scores = scores.view(n_heads, n_blocks, n_tokens, KEY_BLOCK).transpose(1, 2).flatten(2)
        scores = scores[..., :end]
        if n_tokens > 1:
            scores[..., end - n_tokens :] += torch.full((n_tokens, n_tokens), -math.inf).triu_(1)
        weights = scores.softmax(-1, torch.float32).to(self.values.dtype)
        return weighted_sums(self.values[layer_id], value_rows, weights).view(queries.shape)

    def attend_many(self, layer_id: int, queries: Tensor, end: int) -> Tensor:
        """The same by scaled_dot_product_attention, in fp32: on many CPUs 16 bits are slow."""
        n_tokens, n_blocks = queries.shape[1], math.ceil(end / KEY_BLOCK)
        keys = self.keys[layer_id, :n_blocks].permute(1, 0, 3, 2).float().flatten(1, 2)[:, :end]
        values = self.values[layer_id, :, :end].float()
        mask = torch.ones(n_tokens, end, dtype=torch.bool).tril(end - n_tokens)
        q, k, v = (x[None] for x in (queries.float(), keys, values))
        return F.scaled_dot_product_attention(q, k, v, mask, scale=1.0, enable_gqa=True)[0]

    def row_indices(self, n_heads: int, n_tokens: int, end: int) -> list[Tensor]:
        """Indices into a layer's keys and values, for `weighted_sums`. All layers share them.

        int32 (n_heads * number of blocks * n_tokens, head_dim), and (n_heads * n_tokens, end).
        """
        _, n_blocks, n_kv_heads, head_dim, _ = self.keys.shape
        if self.indices_for != (n_tokens, end):
            arange = functools.partial(torch.arange, dtype=torch.int32)
            head = (arange(n_heads) // (n_heads // n_kv_heads))[:, None]
            block = head + n_kv_heads * arange(math.ceil(end / KEY_BLOCK))
            key_rows = block.view(-1, 1) * head_dim + arange(head_dim)
            value_rows = head * n_blocks * KEY_BLOCK + arange(end)
            # All tokens read a block one after another, while it is in the L1 cache.
            self.indices = [rows.repeat_interleave(n_tokens, 0) for rows in (key_rows, value_rows)]
            self.indices_for = n_tokens, end
        return self.indices


def weighted_sums(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Sum over j of weights[i, j] * table[indices[i, j]], for each i.

    Args:
        table: Rows, (..., n_columns).
        indices: Of rows, int32 (n_sums, n).
        weights: n_sums * n elements of any shape.
    Returns:
        (n_sums, n_columns).
    """
    table = table.view(-1, table.shape[-1])
    offsets = bag_offsets(*indices.shape)
    arguments = {"mode": 0, "per_sample_weights": weights.flatten()}  # mode 0: sum
    return torch.embedding_bag(table, indices.flatten(), offsets, **arguments)[0]


@functools.lru_cache(maxsize=32)  # F.embedding_bag makes them anew: 4 % of a token
def bag_offsets(n_bags: int, length: int) -> Tensor:
    return torch.arange(0, n_bags * length, length, dtype=torch.int32)
