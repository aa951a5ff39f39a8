"""Text from tokens as they come, given out as soon as it is sure not to change."""

from collections.abc import Callable, Sequence
from os.path import commonprefix

from hybrid_jax.data.tokenizers import Tokenizer

CONTEXT = 8  # tokens before the first that are decoded with it, for the space between them
UNDECIDED = "\N{REPLACEMENT CHARACTER}"  # what the start of a character of several bytes is decoded to
BYTES = 4  # of a character, at most, and so its tokens


class TextStream:
    """The text of one row: :meth:`push` tokens and get text, whole characters that hold no part of a stop string; then :meth:`flush`.

    All that is given out, one after the other, is the text of all the tokens, up to the first stop string; with the whole of the
    character that they begin in, where those before end inside of one.

    tokenizer: of the tokens. stop: strings that end the text. before: the tokens that came before the first one.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: Sequence[int] = ()):
        self.stopped = False  # whether a stop string was found
        self._decode = tokenizer.decode
        self._stop = tuple(stop)
        # the last ones given out, which are context, then the undecided
        self._tokens, self._decided = _whole_characters(self._decode, list(before[-CONTEXT:]))
        self._given = self._undecided_text()  # of the undecided, what needs not be given out: as long as it stays so, it came before
        self._held = ""  # text that may be the beginning of a stop string

    def push(self, token: int) -> str:
        """The text that ``token`` makes sure of, often "". None after a stop string has been found."""
        self._tokens.append(token)
        new = self._new_text()
        if not new or new.endswith(UNDECIDED):
            return ""
        del self._tokens[: self._decided]
        self._decided, self._given = len(self._tokens), ""
        return self._until_stop(new)

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        rest = self._until_stop(self._new_text())
        rest, self._held = rest + self._held, ""
        return rest

    def _undecided_text(self) -> str:
        return self._decode(self._tokens)[len(self._decode(self._tokens[: self._decided])) :]

    def _new_text(self) -> str:
        text = self._undecided_text()
        return text[len(commonprefix([text, self._given])) :]

    def _until_stop(self, new: str) -> str:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((n for stop in self._stop for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _whole_characters(decode: Callable[[Sequence[int]], str], tokens: list[int]) -> tuple[list[int], int]:
    """(``tokens`` without the end of a character at their start, how many of them are before the start of one at their end)."""
    for start in range(min(BYTES, len(tokens))):
        for rest in range(min(BYTES, len(tokens) - start + 1)):
            if UNDECIDED not in decode(tokens[start : len(tokens) - rest]):
                return tokens[start:], len(tokens) - start - rest
    return tokens, len(tokens)  # it is in the text itself
