"""Inference of Meta's LLaMA models on a CPU, in plain PyTorch."""

from .checkpoint import load
from .errors import UserError
from .generation import LLaMA
from .model import ModelArgs, Transformer
from .tokenizer import Tokenizer

__all__ = ["LLaMA", "ModelArgs", "Tokenizer", "Transformer", "UserError", "load"]
