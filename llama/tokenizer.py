"""LLaMA's tokenizer: a sentencepiece model, and the tokens that a fine-tuned model adds to it."""

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from .errors import UserError, check_file

# sentencepiece decodes each byte that is not UTF-8 to one U+FFFD.
codecs.register_error("replace_each", lambda e: ("\ufffd" * (e.end - e.start), e.end))


class Tokenizer:
    """Text to token ids and back.

    Args:
        model_path: A sentencepiece model with <s> and </s>, such as LLaMA's tokenizer.model.
        added_tokens: Ids of tokens that are not in that file, by their text.
        eos_ids: Ids that end a sequence, beside </s>.

    Attributes:
        n_words: Number of ids, those of added tokens included.
        bos_id, eos_id: Of <s> and </s>.
        eos_ids: All ids that end a sequence.
    """

    def __init__(
        self,
        model_path: str | Path,
        added_tokens: Mapping[str, int] | None = None,
        eos_ids: Iterable[int] = (),
    ):
        self.sp_model = read_model(Path(model_path))
        self.added_tokens = dict(added_tokens or {})
        self.added_texts = {token: text for text, token in self.added_tokens.items()}
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        self.n_words = max([self.sp_model.vocab_size() - 1, *self.added_texts]) + 1
        self.eos_ids = frozenset([self.eos_id, *eos_ids])

    def encode(self, s: str, bos: bool, eos: bool, within: bool = False) -> list[int]:
        """The ids of a text.

        Args:
            s: The text. Added tokens in it become single ids; <s> and </s> do not.
            bos, eos: Put bos_id before, eos_id after.
            within: `s` continues an earlier text, so no space is added before it.
        """
        ids = []
        for part in split_at(self.added_tokens, s):
            if part in self.added_tokens:
                ids.append(self.added_tokens[part])
            else:
                ids += self.encode_plain(part, within or bool(ids))
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_plain(self, s: str, within: bool) -> list[int]:
        """The ids of a text in which no token is special."""
        s = s.encode("utf-8", "replace").decode()  # half of a surrogate pair is not a character
        before = "\n" if within else ""  # a byte token, which never merges with the text after it
        return self.sp_model.encode(before + s)[len(self.sp_model.encode(before)) :]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids."""
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids: Iterable[int], within: bool = False) -> Iterator[str]:
        """Yield the text of each id as it comes. The pieces join to `decode` of all ids.

        A character whose bytes come in several ids is held back until it is complete.

        Args:
            within: The ids continue an earlier text, so a space before the first one is kept.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")("replace_each")
        sp = self.sp_model
        for token in ids:
            is_added = token in self.added_texts or token >= sp.vocab_size()
            if is_added:
                yield utf8.decode(b"", final=True) + self.added_texts.get(token, "")
            elif sp.is_byte(token):
                yield utf8.decode(bytes([int(sp.id_to_piece(token)[3:5], 16)]))  # <0x0A>
            else:
                # decode() drops a space before the first piece: decode the token twice to keep it.
                first = sp.decode([token])
                piece = sp.decode([token, token])[len(first) :] if within else first
                yield utf8.decode(b"", final=True) + piece
            within = within or is_added or not sp.is_control(token)
        yield utf8.decode(b"", final=True)


def split_at(special: Iterable[str], text: str) -> list[str]:
    """Split a text at special tokens, the longest that match. Parts 1, 3, 5, ... are tokens."""
    pattern = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    return re.split(f"({pattern})", text) if pattern else [text]


def read_model(path: Path) -> SentencePieceProcessor:
    """Read a sentencepiece model and check that every piece of it can be used."""
    check_file(path)
    content = path.read_bytes()
    try:
        model = SentencePieceProcessor(model_proto=content)
        model.id_to_piece(list(range(model.vocab_size())))
    except (RuntimeError, UnicodeDecodeError):
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
            raise UserError(f"{path} is Llama 3's (tiktoken): this is for LLaMA 1 and 2") from None
        raise UserError(f"{path} is not a valid sentencepiece model") from None
    if min(model.bos_id(), model.eos_id()) < 0:
        raise UserError(f"{path} has no <s> and </s>: it is not LLaMA's tokenizer")
    return model
