"""The key-value cache of one sequence, and attention to it.

For one token, with p = softmax(q K^T / sqrt(head_dim)), q K^T and p V are weighted sums of rows: of
K^T by q, and of V by p.
`torch.embedding_bag` computes them at memory bandwidth; matmul and scaled_dot_product_attention
take 2 to 10 times as long on AMD Zen 5 (512 and 2,000 positions), 1.4 times on an Intel Xeon.
"""

import functools
import math

import torch
from torch import Tensor

KEY_BLOCK = 64  # positions in a block of keys
QUERY_CHUNK = 64  # tokens whose scores are computed at once: measured fastest
MAX_SCORES = 2**23  # that are computed at once: bounds the memory at long contexts


class KVCache:
    """Keys and values of every layer.

    Attributes:
        keys: K^T in blocks of positions, (n_layers, n_blocks, n_kv_heads, head_dim, KEY_BLOCK).
        values: V, (n_layers, n_kv_heads, n_blocks * KEY_BLOCK, head_dim).

    Args:
        length: Number of positions.
    """

    def __init__(
        self, n_layers: int, n_kv_heads: int, head_dim: int, length: int, dtype: torch.dtype
    ):
        n_blocks = math.ceil(length / KEY_BLOCK)
        self.keys = torch.empty(n_layers, n_blocks, n_kv_heads, head_dim, KEY_BLOCK, dtype=dtype)
        self.values = torch.empty(n_layers, n_kv_heads, n_blocks * KEY_BLOCK, head_dim, dtype=dtype)
        self.indices_end, self.indices = 0, ()

    def update(self, layer_id: int, start_pos: int, xk: Tensor, xv: Tensor) -> None:
        """Store keys and values, (n_tokens, n_kv_heads, head_dim), from start_pos on."""
        end = start_pos + len(xk)
        for block in range(start_pos // KEY_BLOCK, math.ceil(end / KEY_BLOCK)):
            first = max(start_pos, block * KEY_BLOCK)
            last = min(end, (block + 1) * KEY_BLOCK)
            columns = slice(first - block * KEY_BLOCK, last - block * KEY_BLOCK)
            new = xk[first - start_pos : last - start_pos]
            self.keys[layer_id, block, :, :, columns] = new.permute(1, 2, 0)
        self.values[layer_id, :, start_pos:end] = xv.transpose(0, 1)

    def read(self, layer_id: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values of some positions, (n_positions, n_kv_heads, head_dim)."""
        keys = self.keys[layer_id].permute(0, 3, 1, 2).contiguous().flatten(0, 1)[start:end]
        return keys, self.values[layer_id, :, start:end].transpose(0, 1).clone()

    def attend(self, layer_id: int, xq: Tensor, end: int) -> Tensor:
        """softmax(q k^T / sqrt(head_dim)) v of the last len(xq) tokens before position `end`.

        xq and the result: (n_tokens, n_heads, head_dim).
        """
        if len(xq) == 1:
            return self.attend_one(layer_id, xq[0], end)[None]
        step = max(min(QUERY_CHUNK, MAX_SCORES // (xq.shape[1] * end)), 1)
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
        """Attention of several tokens, by matrix products."""
        n_tokens, _, head_dim = xq.shape
        # Whole blocks are contiguous: matmul does not copy them.
        keys = self.keys[layer_id, : math.ceil(end / KEY_BLOCK)]
        queries = (xq / math.sqrt(head_dim)).to(keys.dtype).unflatten(1, (keys.shape[1], -1))
        queries = queries.permute(1, 2, 0, 3).flatten(1, 2)  # (n_kv_heads, -1, head_dim)
        scores = (queries @ keys).permute(1, 2, 0, 3).flatten(2)[..., :end]
        mask = torch.ones(n_tokens, end, dtype=torch.bool).triu(end - n_tokens + 1)
        scores = scores.unflatten(1, (-1, n_tokens)).masked_fill(mask, -math.inf)
        weights = scores.softmax(-1, torch.float32).to(keys.dtype).flatten(1, 2)
        output = weights @ self.values[layer_id, :, :end]  # (n_kv_heads, -1, head_dim)
        output = output.unflatten(1, (-1, n_tokens)).permute(2, 0, 1, 3)
        return output.flatten(1, 2).type_as(xq)

    def row_indices(self, n_heads: int, end: int) -> tuple[Tensor, ...]:
        """Indices into a layer's keys and values, for `weighted_sums`. All layers share them.

        int32 (n_heads * number of blocks, head_dim), and (n_heads, end).
        """
        _, n_blocks, n_kv_heads, head_dim, _ = self.keys.shape
        if self.indices_end != end:
            arange = functools.partial(torch.arange, dtype=torch.int32)
            head = (arange(n_heads) // (n_heads // n_kv_heads))[:, None]
            block = head + n_kv_heads * arange(math.ceil(end / KEY_BLOCK))
            key_rows = block.view(-1, 1) * head_dim + arange(head_dim)
            value_rows = head * n_blocks * KEY_BLOCK + arange(end)
            self.indices_end, self.indices = end, (key_rows, value_rows)
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
