"""LLaMA's tokenizer: a sentencepiece model."""

from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor


class Tokenizer:
    def __init__(self, model_path: str | Path):
        self.sp_model = SentencePieceProcessor(model_file=str(model_path))
        self.n_words: int = self.sp_model.vocab_size()
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        self.pad_id: int = self.sp_model.pad_id()  # -1 in LLaMA: no piece, never an index

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """The ids of `s`, between bos_id and eos_id where asked."""
        return [self.bos_id] * bos + self.sp_model.encode(s) + [self.eos_id] * eos

    def decode(self, ids: Sequence[int]) -> str:
        return self.sp_model.decode(list(ids))
