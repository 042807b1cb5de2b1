"""Prompt lookup decoding: several tokens for one pass over the weights."""

from collections.abc import Sequence

NGRAMS = (3, 2)  # n of the n-grams that are looked up, longest first
FIRST_LENGTH = 4  # tokens of the first draft
MAX_PAUSE = 32  # passes without a draft


class PromptLookup:
    """Drafts the next tokens: those that followed the last few tokens when they occurred before.

    This is speculative decoding (arXiv 2211.17192) whose draft comes from the context itself. A
    pass over a few tokens costs little more than over one, because both read all weights.

    Args:
        limit: Maximum number of tokens of a draft. 0: no drafts.
    """

    def __init__(self, limit: int):
        self.limit, self.length = limit, min(FIRST_LENGTH, limit)
        self.backoff = 0  # length of the last pause, in passes
        self.pause = 0  # passes of it that are left
        self.reset()

    def reset(self) -> None:
        """Forget the context. Call it after tokens were removed from the context."""
        self.continuations: dict[tuple[int, ...], int] = {}  # n-gram: index of the token after it
        self.n_seen = 1

    def draft(self, tokens: Sequence[int]) -> list[int]:
        """Tokens that may follow a context, at most `length`."""
        for end in range(self.n_seen, len(tokens)):
            for n in NGRAMS:
                self.continuations[tuple(tokens[max(end - n, 0) : end])] = end
        self.n_seen = max(len(tokens), 1)
        if self.pause:
            self.pause -= 1
            return []
        found = (self.continuations.get(tuple(tokens[-n:])) for n in NGRAMS)
        start = next(filter(None, found), len(tokens))
        return list(tokens[start : start + self.length])

    def adapt(self, n_drafted: int, n_accepted: int) -> None:
        """Double the length after a draft that was right; otherwise use the number accepted.

        After n drafts in a row of which nothing was accepted, the next min(2^n, 32) passes have
        none.
        """
        if n_drafted:
            length = 2 * self.length if n_accepted == n_drafted else n_accepted
            self.length = min(max(length, 2), self.limit)
            self.backoff = 0 if n_accepted else min(2 * self.backoff or 2, MAX_PAUSE)
            self.pause = self.backoff
