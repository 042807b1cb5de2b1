"""Inference of Meta's LLaMA models on a CPU, in plain PyTorch."""

import os
import warnings

# PyTorch reads this once: memory in pages of 2 MB is faster to get, and to read.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# OpenMP's threads spin where they wait for one another. Without a bound, one that has no core, since
# other programs are busy, makes all others wait for a whole time slice at every matrix.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")  # GNU's runtime: Linux
    os.environ.setdefault("KMP_BLOCKTIME", "1")  # LLVM's, in ms: macOS
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # which nothing here needs
# That PyTorch will do away with FBGEMM's some day is nothing to tell at each start.
warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")

try:
    import torch

    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 13):
        raise SystemExit(f"error: PyTorch is {torch.__version__}: pip install 'torch>=2.13,<3'")
    from .checkpoint import load
    from .errors import UserError
    from .generation import LLaMA
    from .model import ModelArgs, Transformer
    from .tokenizer import Tokenizer
except KeyboardInterrupt:  # Ctrl-C while PyTorch is on its way
    raise SystemExit(130) from None

__all__ = ["LLaMA", "ModelArgs", "Tokenizer", "Transformer", "UserError", "load"]
