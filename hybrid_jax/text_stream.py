"""Text from tokens as they come, given out as soon as it is sure not to change."""

from collections.abc import Sequence

from hybrid_jax.data.tokenizers import Tokenizer

CONTEXT = 8  # tokens before the first that are decoded with it, for the space between them
UNDECIDED = "\N{REPLACEMENT CHARACTER}"  # what the start of a character of several bytes is decoded to


class TextStream:
    """The text of one row: :meth:`push` tokens and get text, whole characters that hold no part of a stop string; then :meth:`flush`.

    All that is given out, one after the other, is the text of all the tokens, up to the first stop string.

    tokenizer: of the tokens. stop: strings that end the text. before: the tokens that came before the first one.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: Sequence[int] = ()):
        self.stopped = False  # whether a stop string was found
        self._decode = tokenizer.decode
        self._stop = tuple(stop)
        self._tokens = list(before[-CONTEXT:])  # the last ones given out, which are context, then the undecided
        self._decided = len(self._tokens)
        self._held = ""  # text that may be the beginning of a stop string

    def push(self, token: int) -> str:
        """The text that ``token`` makes sure of, often "". None after a stop string has been found."""
        self._tokens.append(token)
        new = self._new_text()
        if not new or new.endswith(UNDECIDED):
            return ""
        del self._tokens[: self._decided]
        self._decided = len(self._tokens)
        return self._until_stop(new)

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        rest = self._until_stop(self._new_text())
        rest, self._held = rest + self._held, ""
        return rest

    def _new_text(self) -> str:
        before = self._decode(self._tokens[: self._decided])
        return self._decode(self._tokens)[len(before) :]

    def _until_stop(self, new: str) -> str:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((n for stop in self._stop for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
