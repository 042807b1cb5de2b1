"""Keys and values of one sequence, in the layout that attention reads for one token.

With one query both halves of attention are weighted sums of rows: the scores are the sum over j of
q[j] times row j of K^T, the output is the sum over positions t of p[t] times row t of V. That is
`torch.embedding_bag`, which reads rows at the memory's speed; matmul and
scaled_dot_product_attention read them at a fraction of it, or copy them first.
"""

import functools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # positions whose keys lie together
READ = 2**23  # numbers of K that `read` copies at a time


class KVCache:
    """`keys` are K^T in blocks: (n_layers, n_kv_heads, length / BLOCK, head_dim, BLOCK).

    `values` are V: (n_layers, n_kv_heads, length, head_dim). `length` is what is reserved; a longer
    sequence doubles it.
    """

    def __init__(
        self, n_layers: int, n_kv_heads: int, head_dim: int, length: int, dtype: torch.dtype
    ):
        n_blocks = math.ceil(length / BLOCK)
        self.keys = torch.empty(n_layers, n_kv_heads, n_blocks, head_dim, BLOCK, dtype=dtype)
        self.values = torch.empty(n_layers, n_kv_heads, n_blocks * BLOCK, head_dim, dtype=dtype)
        self.known = (0, 0), ()

    def update(
        self, layer_id: int, start_pos: int, xk: Tensor, xv: Tensor, heads: slice = slice(None)
    ) -> None:
        """Store (n_tokens, n_kv_heads, head_dim), or those heads alone, from that position on."""
        end = start_pos + len(xk)
        n_blocks = self.keys.shape[2]
        if end > n_blocks * BLOCK:
            more = max(math.ceil(end / BLOCK) - n_blocks, n_blocks)
            self.keys = F.pad(self.keys, (0, 0, 0, 0, 0, more))
            self.values = F.pad(self.values, (0, 0, 0, more * BLOCK))
        for block in range(start_pos // BLOCK, math.ceil(end / BLOCK)):
            begin, stop = max(start_pos, block * BLOCK), min(end, (block + 1) * BLOCK)
            columns = slice(begin - block * BLOCK, stop - block * BLOCK)
            new = xk[begin - start_pos : stop - start_pos]
            self.keys[layer_id, heads, block, :, columns] = new.permute(1, 2, 0)
        self.values[layer_id, heads, start_pos:end] = xv.transpose(0, 1)

    def read(self, layer_id: int, end: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """A few heads at a time: which, their K, which is copied, and V: (heads, end, head_dim)."""
        _, n_kv_heads, _, head_dim, _ = self.keys.shape
        few = max(READ // (end * head_dim), 1)
        for first in range(0, n_kv_heads, few):
            heads = slice(first, first + few)
            blocks = self.keys[layer_id, heads, : math.ceil(end / BLOCK)]
            keys = blocks.mT.contiguous().flatten(1, 2)[:, :end]
            yield heads, keys, self.values[layer_id, heads, :end]

    def attend(self, layer_id: int, xq: Tensor, end: int) -> Tensor:
        """softmax(q k^T / sqrt(head_dim)) v for one token's (n_heads, head_dim), of that shape."""
        key_rows, value_rows = self.bags(len(xq), end)
        queries = (xq / math.sqrt(xq.shape[1])).to(self.keys.dtype)
        queries = queries[:, None].expand(-1, len(key_rows) // len(xq), -1)
        scores = weighted_sums(self.keys[layer_id], key_rows, queries)
        weights = scores.view(len(xq), -1)[:, :end].softmax(1, torch.float32)
        weights = weights.to(self.values.dtype)
        return weighted_sums(self.values[layer_id], value_rows, weights).type_as(xq)

    def bags(self, n_heads: int, end: int) -> tuple[Tensor, ...]:
        """Which rows of a layer's keys each head sums, block by block, and which of its values.

        All layers ask for the same: the last answer is kept.
        """
        _, n_kv_heads, n_reserved, head_dim, _ = self.keys.shape
        if self.known[0] != (end, n_reserved):
            count = functools.partial(torch.arange, dtype=torch.int32)
            head = (count(n_heads) // (n_heads // n_kv_heads))[:, None]
            block = head * n_reserved + count(math.ceil(end / BLOCK))
            key_rows = block.view(-1, 1) * head_dim + count(head_dim)
            value_rows = head * n_reserved * BLOCK + count(end)
            self.known = (end, n_reserved), (key_rows, value_rows)
        return self.known[1]


def weighted_sums(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Of the table's rows (..., n), a weighted sum for each line of row numbers: (n_bags, n).

    rows: int32 (n_bags, length); weights: as many numbers, of the table's dtype.
    """
    table = table.view(-1, table.shape[-1])
    bags, weights = bag_starts(*rows.shape), weights.flatten()
    return torch.embedding_bag(table, rows.flatten(), bags, False, 0, False, weights)[0]


@functools.lru_cache(maxsize=32)
def bag_starts(n_bags: int, length: int) -> Tensor:
    return torch.arange(0, n_bags * length, length, dtype=torch.int32)
