"""The key-value cache of one sequence, and attention to it.

For one token both halves of attention are weighted sums of rows: the scores are the sum over j of
q[j] times row j of K^T, and the output is the sum over positions t of p[t] times row t of V.
`torch.embedding_bag` computes such sums at the speed of memory; matmul and
scaled_dot_product_attention take 2 to 10 times as long (measured on AMD Zen 5, 512 and 2,000
positions; 1.4 times on Intel Emerald Rapids).
"""

import functools
import math

import torch
from torch import Tensor

BLOCK = 64  # positions in a block of keys
MAX_QUERIES = 64  # tokens whose scores are computed at once: measured fastest
MAX_SCORES = 2**23  # and their scores: bounds the memory at long contexts


class KVCache:
    """Keys and values of every layer.

    Attributes:
        keys: K^T in blocks of positions, (n_layers, n_blocks, n_kv_heads, head_dim, BLOCK).
        values: V, (n_layers, n_kv_heads, n_blocks * BLOCK, head_dim).

    Args:
        n_layers, n_kv_heads, head_dim: The model's.
        length: Positions that fit in.
        dtype: Of keys and values.
    """

    def __init__(
        self, n_layers: int, n_kv_heads: int, head_dim: int, length: int, dtype: torch.dtype
    ):
        n_blocks = math.ceil(length / BLOCK)
        self.keys = torch.empty(n_layers, n_blocks, n_kv_heads, head_dim, BLOCK, dtype=dtype)
        self.values = torch.empty(n_layers, n_kv_heads, n_blocks * BLOCK, head_dim, dtype=dtype)
        self.cached_end, self.cached_rows = 0, ()

    def update(self, layer_id: int, start_pos: int, xk: Tensor, xv: Tensor) -> None:
        """Store keys and values, (n_tokens, n_kv_heads, head_dim), from start_pos on."""
        end = start_pos + len(xk)
        for block in range(start_pos // BLOCK, math.ceil(end / BLOCK)):
            first, last = max(start_pos, block * BLOCK), min(end, (block + 1) * BLOCK)
            columns = slice(first - block * BLOCK, last - block * BLOCK)
            new = xk[first - start_pos : last - start_pos]
            self.keys[layer_id, block, :, :, columns] = new.permute(1, 2, 0)
        self.values[layer_id, :, start_pos:end] = xv.transpose(0, 1)

    def read(self, layer_id: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values of some positions, (n_positions, n_kv_heads, head_dim)."""
        keys = self.keys[layer_id].permute(0, 3, 1, 2).contiguous().flatten(0, 1)[start:end]
        return keys, self.values[layer_id, :, start:end].transpose(0, 1).clone()

    def attend(self, layer_id: int, xq: Tensor, end: int) -> Tensor:
        """softmax(q k^T / sqrt(head_dim)) v of the tokens that end before position `end`.

        xq and the result: (n_tokens, n_heads, head_dim).
        """
        if len(xq) == 1:
            return self.attend_one(layer_id, xq[0], end)[None]
        step = max(min(MAX_QUERIES, MAX_SCORES // (xq.shape[1] * end)), 1)
        outputs, start_pos = [], end - len(xq)
        for queries in xq.split(step):
            start_pos += len(queries)
            outputs.append(self.attend_many(layer_id, queries, start_pos))
        return torch.cat(outputs)

    def attend_one(self, layer_id: int, xq: Tensor, end: int) -> Tensor:
        """Attention of one token, (n_heads, head_dim) like xq, by weighted sums of rows."""
        key_rows, value_rows = self.row_indices(len(xq), end)
        queries = (xq / math.sqrt(xq.shape[1])).to(self.keys.dtype)
        queries = queries[:, None].expand(-1, len(key_rows) // len(xq), -1)
        scores = weighted_sums(self.keys[layer_id], key_rows, queries)
        weights = scores.view(len(xq), -1)[:, :end].softmax(1, torch.float32)
        weights = weights.to(self.values.dtype)
        return weighted_sums(self.values[layer_id], value_rows, weights).type_as(xq)

    def attend_many(self, layer_id: int, xq: Tensor, end: int) -> Tensor:
        """Attention of several tokens by matrix products, with the blocks of keys in place."""
        n_tokens, _, head_dim = xq.shape
        keys = self.keys[layer_id, : math.ceil(end / BLOCK)]  # contiguous: matmul copies nothing
        queries = (xq / math.sqrt(head_dim)).to(keys.dtype).unflatten(1, (keys.shape[1], -1))
        queries = queries.permute(1, 2, 0, 3).flatten(1, 2)  # (n_kv_heads, -1, head_dim)
        scores = (queries @ keys).permute(1, 2, 0, 3).flatten(2)[..., :end]
        is_later = torch.ones(n_tokens, end, dtype=torch.bool).triu(end - n_tokens + 1)
        scores = scores.unflatten(1, (-1, n_tokens)).masked_fill(is_later, -math.inf)
        weights = scores.softmax(-1, torch.float32).to(keys.dtype).flatten(1, 2)
        output = weights @ self.values[layer_id, :, :end]  # (n_kv_heads, -1, head_dim)
        output = output.unflatten(1, (-1, n_tokens)).permute(2, 0, 1, 3)
        return output.flatten(1, 2).type_as(xq)

    def row_indices(self, n_heads: int, end: int) -> tuple[Tensor, ...]:
        """The rows of a layer's keys that each head sums, block by block, and those of its values.

        They are the same for all layers, so the last result is kept.
        """
        _, n_blocks, n_kv_heads, head_dim, _ = self.keys.shape
        if self.cached_end != end:
            arange = functools.partial(torch.arange, dtype=torch.int32)
            head = (arange(n_heads) // (n_heads // n_kv_heads))[:, None]
            block = head + n_kv_heads * arange(math.ceil(end / BLOCK))
            key_rows = block.view(-1, 1) * head_dim + arange(head_dim)
            value_rows = head * n_blocks * BLOCK + arange(end)
            self.cached_end, self.cached_rows = end, (key_rows, value_rows)
        return self.cached_rows


def weighted_sums(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Sums of rows of a table: (n_sums, row_length) from row indices and weights (n_sums, n)."""
    table = table.view(-1, table.shape[-1])
    starts = bag_starts(*rows.shape)
    return torch.embedding_bag(table, rows.flatten(), starts, False, 0, False, weights.flatten())[0]


@functools.lru_cache(maxsize=32)
def bag_starts(n_bags: int, length: int) -> Tensor:
    return torch.arange(0, n_bags * length, length, dtype=torch.int32)
