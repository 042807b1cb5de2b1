"""LLaMA's tokenizer: a sentencepiece model."""

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from .errors import UserError

# Where bytes are no UTF-8, sentencepiece has one U+FFFD for each of them.
codecs.register_error("each", lambda error: ("\ufffd" * (error.end - error.start), error.end))


class Tokenizer:
    def __init__(self, model_path: str | Path):
        try:
            model = Path(model_path).read_bytes()
            self.sp_model = SentencePieceProcessor(model_proto=model)
        except (FileNotFoundError, IsADirectoryError):
            raise UserError(
                f"{model_path} is no file: it comes with the weights; name it with --tokenizer_path"
            ) from None
        except RuntimeError:
            llama3 = re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", model)
            what = (
                "is Llama 3's (tiktoken): this program runs Llama 1 and 2"
                if llama3
                else ("is no sentencepiece model, or not all of one: get it again")
            )
            raise UserError(f"{model_path} {what}") from None
        self.n_words: int = self.sp_model.vocab_size()
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(f"{model_path} has no <s> and </s>: it is not LLaMA's")
        self.pad_id: int = self.sp_model.pad_id()  # -1 in LLaMA: no piece, never an index

    def encode(self, s: str, bos: bool, eos: bool, within: bool = False) -> list[int]:
        """The ids of `s`, between bos_id and eos_id where asked.

        `within`: `s` goes on with a text, and gets no space before it as the beginning of one does.
        """
        s = s.encode("utf-8", "replace").decode()  # half of a surrogate pair is no character
        before = "\n" if within else ""  # a byte's id, which joins with nothing after it
        ids = self.sp_model.encode(before + s)[len(self.sp_model.encode(before)) :]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: Sequence[int]) -> str:
        return self.sp_model.decode(list(ids))

    def decode_stream(self, ids: Iterable[int], within: bool = False) -> Iterator[str]:
        """The text of each id as it comes; the pieces join to what `decode` makes of all ids.

        A character whose bytes come in several ids is held back until it is whole. `within`: the
        ids go on with a text, so that a space before the first is kept.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")("each")
        sp = self.sp_model
        for token in ids:
            if sp.is_byte(token):
                yield utf8.decode(bytes([int(sp.id_to_piece(token)[3:5], 16)]))  # <0x0A>
            else:
                first = sp.decode([token])
                piece = sp.decode([token, token])[len(first) :] if within else first
                yield utf8.decode(b"", final=True) + piece
            within = within or not sp.is_control(token)
        yield utf8.decode(b"", final=True)
