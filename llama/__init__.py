"""Inference of Meta's LLaMA models on a CPU, in plain PyTorch."""

import os
import warnings

# PyTorch reads this once: memory in pages of 2 MB is faster to get, and to read.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # which nothing here needs
# That PyTorch will do away with FBGEMM's some day is nothing to tell at each start.
warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")

try:
    from .checkpoint import load
    from .errors import UserError
    from .generation import LLaMA
    from .model import ModelArgs, Transformer
    from .tokenizer import Tokenizer
except KeyboardInterrupt:  # Ctrl-C while PyTorch is on its way
    raise SystemExit(130) from None

__all__ = ["LLaMA", "ModelArgs", "Tokenizer", "Transformer", "UserError", "load"]
