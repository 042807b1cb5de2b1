"""Quantizing a model in one forward pass over a short text.

Each layer reads its weight when the pass reaches it, multiplies in fp32, takes the directions to be
kept exact from its input, rounds the weight, and lets it go.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..model import ModelArgs, Transformer
from ..tokenizer import Tokenizer
from ..weights import WEIGHTS, Weight
from .linear import Int4Linear, Int8Embedding, Int8Linear
from .rounding import GROUPS, group_size

N_TOKENS = 128  # of the text; at most this many directions can be estimated
TEXT = """The river rises in the hills above the town, where two small streams meet below an old
stone bridge. In spring, when the snow melts, it carries more water than at any other time of the
year, and the farmers on its banks have learned to keep their animals away from the lower fields.
"I remember the flood of 1953," said Anna, who has run the mill for forty years. "We lost 12 sheep,
3 carts and most of the hay; but nobody was hurt, and that is what matters." Her grandson wrote a
program that reads the level of the water every ten minutes and sends a message when it is too high.
It is not a large program: a few functions, a table, and a loop that waits for the next reading."""

Deliver = Callable[[str, nn.Module], None]  # takes a path in the model and its quantized module


def module_class(name: str, shape: torch.Size, scheme: str) -> type[nn.Module] | None:
    """The class that holds a weight under a quantization scheme. None: it stays as it is."""
    min_bits = WEIGHTS[name.split(".")[-2]].min_bits if len(shape) == 2 else 16
    if min_bits == 16:
        return None
    if name.startswith("tok_embeddings"):
        return Int8Embedding
    int4 = scheme == "int4" and min_bits == 4 and group_size(shape[1])
    return Int4Linear if int4 else Int8Linear


class CalibrationLinear(nn.Module):
    """Multiplies by a weight in fp32, and delivers its quantized layer."""

    def __init__(self, path: str, weight: Weight, scheme: str, deliver: Deliver):
        super().__init__()
        self.path, self.source, self.deliver = path, weight, deliver
        self.quantized_class = module_class(f"{path}.weight", weight.shape, scheme)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.source.read(torch.float32)
        layer = self.quantized_class(*weight.shape)
        layer.quantize(weight, input_directions(x, len(layer.directions)))
        y = F.linear(x, weight)
        del weight  # before the layer is packed
        check_finite(self.source.name, y, *layer.buffers())
        self.deliver(self.path, layer)
        return y


@functools.lru_cache(maxsize=1)  # wq wk wv, and w1 w3, have one input
def input_directions(x: Tensor, k: int) -> Tensor:
    """The first k right singular vectors of an input (n_tokens, in_features), as rows: (k, -1).

    If the input has a lower rank, the others are zero.
    """
    x = x.double()
    vectors = torch.linalg.eigh(x @ x.t()).eigenvectors  # of (n_tokens, n_tokens): few
    rows = vectors[:, -k:].flip(1).t() @ x
    norms = rows.norm(dim=1, keepdim=True)
    kept = torch.where(norms > 1e-6 * norms.max(), rows / norms, 0)
    return F.pad(kept, (0, 0, 0, k - len(kept))).float()


class CalibrationEmbedding(nn.Module):
    """Looks up tokens in fp32, and delivers the quantized embedding."""

    def __init__(self, path: str, weight: Weight, deliver: Deliver):
        super().__init__()
        self.path, self.source, self.deliver = path, weight, deliver

    def forward(self, tokens: Tensor) -> Tensor:
        weight = self.source.read(torch.float32)
        layer = Int8Embedding(*weight.shape)
        layer.quantize(weight)
        y = weight[tokens]
        del weight
        check_finite(self.source.name, *layer.buffers())
        self.deliver(self.path, layer)
        return y


def check_finite(name: str, *tensors: Tensor) -> None:
    """Refuse a weight whose quantized layer, or product with its input, has Inf or NaN in it."""
    if not all(t.isfinite().all() for t in tensors if t.is_floating_point()):
        raise UserError(f"{name} has values that are too large to be quantized")


@torch.inference_mode()
def calibrate(
    args: ModelArgs,
    weights: Mapping[str, Weight],
    scheme: str,
    tokens: Tensor,
    deliver: Deliver,
) -> None:
    """Quantize a model's weights one after another, in the order in which data meets them.

    Args:
        args: The model's shape.
        weights: Its weights, under torchrun this rank's.
        scheme: int8 or int4.
        tokens: Ids of a text, from its first token on, (n_tokens,).
        deliver: Called with the path of a module and the quantized module, its buffers filled.
    """
    with torch.device("meta"):
        model = Transformer(replace(args, max_seq_len=len(tokens)))
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            layer = CalibrationLinear(path, weights[f"{path}.weight"], scheme, deliver)
            model.set_submodule(path, layer)
        elif isinstance(module, nn.Embedding):
            layer = CalibrationEmbedding(path, weights[f"{path}.weight"], deliver)
            model.set_submodule(path, layer)
        elif f"{path}.weight" in weights:
            module.weight = nn.Parameter(weights[f"{path}.weight"].read(torch.float32), False)
    if torch.distributed.is_initialized():
        from ..parallel import parallelize

        parallelize(model)
    model.output(model.hidden([tokens], [0], [None]))
    input_directions.cache_clear()


def calibration_tokens(tokenizer: Tokenizer | None, vocab_size: int) -> Tensor:
    """Ids of TEXT, or fixed random ids where there is no tokenizer."""
    if tokenizer:
        return torch.tensor(tokenizer.encode(TEXT, bos=True, eos=False)[:N_TOKENS])
    warnings.warn(
        "there is no tokenizer: the weights are quantized for random tokens, less accurately",
        stacklevel=2,
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(3, vocab_size - 1), vocab_size, (N_TOKENS,), generator=generator)
    ids[0] = min(1, vocab_size - 1)  # <s>
    return ids


def swap_modules(model: nn.Module, classes: Mapping[str, type[nn.Module]]) -> None:
    """Replace modules of a model on the meta device by quantized ones with empty buffers."""
    for path, cls in classes.items():
        model.set_submodule(path, cls(*model.get_submodule(path).weight.shape))


def classes_for(model: nn.Module, scheme: str) -> dict[str, type[nn.Module]]:
    """The classes that a scheme gives the modules of a model, by their path."""
    state = model.state_dict().items()
    found = {n.removesuffix(".weight"): module_class(n, t.shape, scheme) for n, t in state}
    return {path: cls for path, cls in found.items() if cls}


def classes_in(weights: Mapping[str, Weight], model: nn.Module) -> dict[str, type[nn.Module]]:
    """The classes of the modules whose buffers a quantized checkpoint has, by their path."""
    found = {}
    for path, module in model.named_modules():
        if f"{path}.groups" in weights:
            # The file's groups: the size for a rank's narrower row could differ.
            group = module.weight.shape[1] // weights[f"{path}.groups"].shape[0]
            found[path] = functools.partial(Int4Linear, group=group if group in GROUPS else None)
        elif f"{path}.scales" in weights:
            found[path] = Int8Linear if isinstance(module, nn.Linear) else Int8Embedding
    return found
