"""Prompt lookup decoding: several tokens for one pass over the weights."""

from collections.abc import Sequence

NGRAMS = (3, 2)  # last tokens that are looked up in the context, the longest first


class PromptLookup:
    """Guesses the next tokens: those that followed the last few when they occurred before.

    Prompt lookup decoding, a form of speculative decoding (arXiv 2211.17192) whose draft is the
    context itself. A pass over n tokens costs little more than over one, as long as reading the
    weights takes most of its time.
    """

    def __init__(self, limit: int):
        self.limit, self.length, self.pause = limit, limit, 0
        self.reset()

    def reset(self) -> None:
        """Forget the context. To be called after tokens were removed from it."""
        self.continuations: dict[tuple[int, ...], int] = {}  # n-gram: position after its last one
        self.n_seen = 1

    def guess(self, tokens: Sequence[int]) -> list[int]:
        """Tokens that may follow, at most `length`."""
        if not self.limit:
            return []
        for end in range(self.n_seen, len(tokens)):
            for n in NGRAMS:
                self.continuations[tuple(tokens[max(end - n, 0) : end])] = end
        self.n_seen = max(len(tokens), 1)
        if self.pause:
            self.pause -= 1
            return []
        for n in NGRAMS:
            if start := self.continuations.get(tuple(tokens[-n:])):
                return list(tokens[start : start + self.length])
        return []

    def learn(self, n_guessed: int, n_kept: int) -> None:
        """Adapt the length: twice as many after a full success, as many as were kept otherwise."""
        if n_guessed:
            grown = 2 * self.length if n_kept == n_guessed else n_kept
            self.pause = 0 if n_kept else 8
            self.length = min(max(grown, 2), self.limit)
