"""Quantizing a model in one forward pass over a short text.

When the pass reaches a layer, the layer's weight is read, the outlier channels of its input are
found, the weight is quantized, the input is multiplied by the original weight in fp32, and the
weight is released.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..linear import fp32_blocks, linear_by_blocks
from ..model import Segment, Transformer
from ..tokenizer import Tokenizer
from ..weights import Weight

N_TOKENS = 128  # of the text
TEXT = """The river rises in the hills above the town, where two small streams meet below an old
stone bridge. In spring, when the snow melts, it carries more water than at any other time of the
year, and the farmers on its banks have learned to keep their animals away from the lower fields.
"I remember the flood of 1953," said Anna, who has run the mill for forty years. "We lost 12 sheep,
3 carts and most of the hay; but nobody was hurt, and that is what matters." Her grandson wrote a
program that reads the level of the water every ten minutes and sends a message when it is
too high."""


def outlier_channels(x: Tensor, k: int) -> Tensor:
    """The k channels of an input (n_tokens, in_features) with the largest sums of squares."""
    return x.double().square().sum(0).topk(min(k, x.shape[1])).indices.sort().values


def check_finite(name: str, *tensors: Tensor) -> None:
    """Refuse a weight if its quantized layer, or its product with the input, has Inf or NaN."""
    if not all(t.isfinite().all() for t in tensors if t.is_floating_point()):
        raise UserError(f"{name} has values that are too large to be quantized")


@torch.inference_mode()
def calibrate(
    model: Transformer, weights: Mapping[str, Weight], tokens: Tensor, on_quantized: Callable
) -> None:
    """Fill the quantized layers of a model, in the order of the forward pass.

    Args:
        model: On the meta device, with quantized layers.
        weights: Its original weights, under torchrun this rank's.
        tokens: Ids of a text, from its first token on, (n_tokens,).
        on_quantized: Called as on_quantized(path, layer) when a layer is filled.
    """
    with torch.device("meta"):
        original = Transformer(replace(model.args, max_seq_len=len(tokens)))

    def forward(path: str, x: Tensor) -> Tensor:
        """x W^T in fp32. Quantizes W on the way, which is held in its file's dtype."""
        layer, source = model.get_submodule(path), weights[f"{path}.weight"]
        weight = source.read(source.dtype)
        layer.quantize(weight, outlier_channels(x, len(layer.outliers)))
        y = linear_by_blocks(x, fp32_blocks(weight))
        check_finite(f"{path}.weight", y, *layer.buffers())
        on_quantized(path, layer)
        return y

    for path, module in original.named_modules():
        if isinstance(module, nn.Linear):
            module.forward = functools.partial(forward, path)
        elif isinstance(module, nn.RMSNorm):
            module.weight = nn.Parameter(weights[f"{path}.weight"].read(torch.float32), False)
    source = weights["tok_embeddings.weight"]
    embedding = source.read(source.dtype)
    model.tok_embeddings.quantize(embedding)
    check_finite("tok_embeddings.weight", model.tok_embeddings.scales)
    original.tok_embeddings = nn.Embedding.from_pretrained(embedding[tokens].float())
    del embedding
    on_quantized("tok_embeddings", model.tok_embeddings)
    if torch.distributed.is_initialized():
        from ..parallel import add_all_reduces

        add_all_reduces(original)
    original.output(original.hidden(torch.arange(len(tokens)), [Segment(0, len(tokens))]))


def calibration_tokens(tokenizer: Tokenizer | None, vocab_size: int) -> Tensor:
    """Ids of TEXT, or fixed random ids where there is no tokenizer."""
    if tokenizer:
        return torch.tensor(tokenizer.encode(TEXT, bos=True, eos=False)[:N_TOKENS])
    warnings.warn(
        "there is no tokenizer: calibrating on random tokens is less accurate. Put tokenizer.model "
        "beside the weights",
        stacklevel=2,
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(3, vocab_size - 1), vocab_size, (N_TOKENS,), generator=generator)
    ids[0] = min(1, vocab_size - 1)  # <s>
    return ids
