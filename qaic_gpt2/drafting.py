"""Prompt-lookup decoding: the next tokens are guessed from the text itself, and verified in one call.

A decode step reads every weight for one token; for a few tokens it takes little longer. Text repeats itself: after the
words that a text ends with, it often continues as it did the last time. Each call verifies such a draft. The logits are
those of the plain loop, one token at a time, and so the sampled tokens are the same, whatever the draft was.

https://github.com/apoorvumang/prompt-lookup-decoding
"""

import numpy as np

LONGEST = 3  # tokens at the end of a text that are looked up, at most


class Drafting:
    """A session of one row, whose decode(tokens) runs the program only if the draft did not foresee the token."""

    def __init__(self, session, draft_tokens: int):
        self.session, self.draft_tokens = session, draft_tokens
        self.calls = self.tokens = 0  # of decode since read

    def __getattr__(self, name: str):
        return getattr(self.session, name)

    @property
    def tokens_per_call(self) -> float:
        return self.tokens / max(self.calls, 1)

    def read(self, row: int, ids: list[int]) -> np.ndarray:
        self.text, self.draft, self.ahead = [*ids], [], []
        self.calls = self.tokens = 0
        return self.session.read(row, ids)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """The next token (1) -> logits (1, V)"""
        token, position = int(tokens[0]), len(self.text)
        self.text.append(token)
        self.tokens += 1
        if self.draft[:1] != [token]:
            self.draft = look_up(self.text, min(self.draft_tokens, self.ctx_len - position - 1))
            self.ahead = [*self.session.verify([token, *self.draft], position)[:, None]]
            self.calls += 1
        else:
            self.draft = self.draft[1:]
        return self.ahead.pop(0)


def look_up(text: list[int], count: int) -> list[int]:
    """At most count tokens that followed the text's last tokens at an earlier place: of LONGEST of these, or fewer."""
    ids = np.array(text)
    for size in range(min(LONGEST, len(ids) - 1), 0, -1):
        same = np.ones(len(ids) - size, bool)  # by the place where size tokens begin, without the last place
        for place in range(size):
            same &= ids[place : place + len(same)] == ids[len(ids) - size + place]
        found = np.flatnonzero(same)
        if len(found):
            followed = found[found + size + count <= len(ids)]  # by count tokens
            start = (followed[-1] if len(followed) else found[0]) + size
            return ids[start : start + count].tolist()
    return []
