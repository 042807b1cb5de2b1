"""Inference of Meta's LLaMA models on a CPU, in plain PyTorch.

    import llama

    model = llama.load("model/demo")
    print(model.generate("Once upon a time", max_gen_len=64)[0])

Import llama before torch: it sets THP_MEM_ALLOC_ENABLE, GOMP_SPINCOUNT and KMP_BLOCKTIME, unless
they are set already, and PyTorch reads them when it is imported.
"""

import os
import sys
import warnings

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # pages of 2 MB: faster to allocate and to read
# OpenMP's threads spin while they wait for one another. If another program takes a core, unbounded
# spinning costs a whole time slice at every matrix product.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # GNU's OpenMP: Linux
    os.environ.setdefault("KMP_BLOCKTIME", "1")  # LLVM's, in milliseconds: macOS
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # not needed here

try:
    import torch

    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 13):
        sys.exit(f"error: this is PyTorch {torch.__version__}: pip install 'torch>=2.13,<3'")
    from .chat import STYLES, Chat
    from .errors import UserError
    from .generation import LLaMA
    from .loading import load
    from .model import ModelArgs, Transformer
    from .sampling import Sampling
    from .tokenizer import Tokenizer
except KeyboardInterrupt:  # Ctrl-C while PyTorch is being imported
    sys.exit(130)
except ModuleNotFoundError as missing:
    if missing.name.startswith(__name__):
        raise  # a bug
    sys.exit(f"error: {missing.name} is not installed: see Setup in README.md")

__version__ = "1.1.0"
__all__ = [
    "STYLES",
    "Chat",
    "LLaMA",
    "ModelArgs",
    "Sampling",
    "Tokenizer",
    "Transformer",
    "UserError",
    "load",
]
