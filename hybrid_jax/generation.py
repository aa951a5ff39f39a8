"""Writing on: prompts are read by chunk, then one token a step, by one compiled function whose cache is donated.

The step reads the token that the last one chose and chooses the next, so a token is on its way to the host while the next is
computed. Rows that have ended are passed over: what a session remembers is what was read and given out, token for token.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from inspect import signature
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybrid_jax import cache as caches
from hybrid_jax.layers import Embedding, Linear
from hybrid_jax.model import Model
from hybrid_jax.sampling import Sampling, sample, sampling
from hybrid_jax.text_stream import CONTEXT, TextStream

CHUNK = 512  # tokens of a prompt read at once; shorter ones in the next power of two, from 16


def generate(model: Model, prompts: Sequence[str] | Sequence[Sequence[int]], **options) -> list[str] | list[list[int]]:
    """What ``model`` writes after each prompt: texts for texts, lists of tokens for lists of tokens. Options as in :func:`stream`."""
    known = [name for name, parameter in signature(stream).parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"generate has no parameter {unknown[0]!r}; beside model and prompts it takes {', '.join(known)}")
    written = [[] for _ in prompts]
    for row, piece in stream(model, prompts, **options):
        written[row].append(piece)
    return ["".join(pieces) for pieces in written] if _are_texts(prompts) else written


def stream(
    model: Model,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    stop_tokens: Sequence[int] | None = None,
    beginning: int | None = None,
) -> Iterator[tuple[int, str | int]]:
    """What ``model`` writes after each prompt, as it is written: (row, some text), or (row, token) for prompts of tokens.

    prompts: a batch, of any lengths. Texts need the model to have its tokenizer (``model.tokenizer``).
    max_new_tokens: the most tokens written after a prompt.
    temperature, top_k, top_p, min_p: see :class:`hybrid_jax.sampling.Sampling`; temperature 0 is greedy.
    seed: of the draws. What a row draws depends on the seed, its place among the prompts and its own text, not on the other rows.
    stop: strings that end a row. A text ends before the string, tokens with the one that completes it.
    stop_tokens: tokens that end a row, not given out themselves; None: the tokenizer's end of a document, where there is one.
    beginning: a token that the model reads before each text, such as 1 (`<s>`) for published models that were trained with it.

    Raises ValueError for an option out of range, a prompt without tokens or with one that is not in the vocabulary.
    """
    settings = sampling(temperature, top_k, top_p, min_p)
    texts = _are_texts(prompts)
    if texts and model.tokenizer is None:
        raise ValueError("prompts are texts and the model has no tokenizer: give lists of token ids, or set model.tokenizer")
    if beginning is not None and not texts:
        raise ValueError("beginning stands before texts, and prompts are tokens: put it first in each of them")
    first = [] if beginning is None else [beginning]
    session = Session(model, len(prompts), seed)
    pieces = session.write(max_new_tokens, settings, stop=stop, stop_tokens=stop_tokens, texts=texts)
    tokens = [first + text for text in model.tokenizer.encode_batch(list(prompts))] if texts else prompts
    session.read(tokens, room=max_new_tokens)
    return pieces


class Session:
    """A batch of texts that go on in turns: :meth:`read` what is given, :meth:`write` what follows.

    After a turn the model remembers what was read and given out, and nothing else: the next is as if all had been one prompt.
    """

    def __init__(self, model: Model, rows: int, seed: int = 0):
        self.model = model
        self.lengths = np.zeros(rows, int)  # tokens of each row, read and written
        self._programs, self._params = _prepare(model)
        self._keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(rows))
        self._drawn = 0  # tokens, whatever became of them: each has noise of its own
        self._slots, self._cache = 0, None
        self._logits = None  # of what comes after the prompts that were read last
        self._unread = [()] * rows  # tokens given out that the cache does not hold yet
        self._recent = [()] * rows  # the last tokens of each row
        self._ended = np.zeros(rows, bool)  # whether a row's turn is over

    def read(self, prompts: Sequence[Sequence[int]], room: int = 0) -> None:
        """Go on with a prompt for each row. room: how many tokens are going to be written, so that space is made for them too.

        Raises ValueError unless each row has one token at least, all of them in the vocabulary.
        """
        self._check(prompts)
        given = [(*unread, *prompt) for unread, prompt in zip(self._unread, prompts, strict=True)]
        longest = max(map(len, given))
        widths = [CHUNK] * (longest // CHUNK)
        if rest := longest % CHUNK:
            widths.insert(0, max(16, 1 << (rest - 1).bit_length()))
        tokens, real = np.zeros((len(given), sum(widths)), np.int32), np.zeros((len(given), sum(widths)), bool)
        for row, prompt in enumerate(given):  # padded on the left, so that every row's last token stands in the last place
            tokens[row, -len(prompt) :], real[row, -len(prompt) :] = prompt, True
        self._reserve(longest + room)
        for end, width in zip(np.cumsum(widths), widths, strict=True):
            part = np.s_[:, end - width : end]
            self._logits, self._cache = self._programs.read(self._params, tokens[part], real[part], self._cache)
        self._unread = [()] * len(given)
        for row, prompt in enumerate(prompts):
            self._note(row, prompt)

    def write(
        self,
        max_new_tokens: int,
        settings: Sampling,
        *,
        stop: str | Sequence[str] = (),
        stop_tokens: Sequence[int] | None = None,
        texts: bool = True,
    ) -> Iterator[tuple[int, str | int]]:
        """What follows the prompts that were read, in pieces; see :func:`stream`. Where it is closed early, the turn ends there.

        Each row then has as many tokens as the others, one more perhaps than were given out.
        """
        tokenizer = self.model.tokenizer
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, needs to be at least 1")
        if not all(stop):
            raise ValueError("stop holds an empty string, needs strings of at least one character")
        if stop and tokenizer is None:
            raise ValueError("stop holds strings and the model has no tokenizer: give stop_tokens, or set model.tokenizer")
        if stop_tokens is None:
            stop_tokens = () if tokenizer is None else (tokenizer.document_end,)
        return self._write(max_new_tokens, settings, stop, frozenset(map(int, stop_tokens)), texts)

    def wait(self) -> None:
        """Return when what was read has been computed: :meth:`read` does not wait for it."""
        jax.block_until_ready((self._logits, self._cache))

    def held_bytes(self) -> tuple[int, int]:
        """Of what it remembers: keys and values with the room made for more, and recurrent layers' states and convolutions."""
        return (0, 0) if self._cache is None else caches.held_bytes(self._cache)

    def _write(self, max_new_tokens, settings, stop, stop_tokens, texts):
        decoded = None
        if texts or stop:
            decoded = [TextStream(self.model.tokenizer, stop, recent) for recent in self._recent]
        for tokens in self._tokens(max_new_tokens, settings, stop_tokens):
            pieces = []
            for row in np.flatnonzero(~self._ended):
                token, text = int(tokens[row]), ""
                if token in stop_tokens:
                    self._ended[row] = True
                    text = decoded[row].flush() if texts else ""
                else:
                    self._note(row, (token,))
                    if decoded:
                        text = decoded[row].push(token)
                        self._ended[row] = decoded[row].stopped
                    if not texts:
                        pieces.append((int(row), token))
                if texts and text:
                    pieces.append((int(row), text))
            yield from pieces  # all rows' tokens are noted by then: closed between two of them, the model still knows what it has read
        for row in np.flatnonzero(~self._ended):
            if texts and (text := decoded[row].flush()):
                yield int(row), text

    def _tokens(self, max_new_tokens: int, settings: Sampling, stop_tokens: frozenset[int]) -> Iterator[np.ndarray]:
        """The tokens [rows] of step after step, until the rows have ended; the next are being computed when some are given out."""
        if self._logits is None:
            raise ValueError("there is nothing to go on from: read a prompt before each write")
        self._reserve(max_new_tokens)
        self._ended[:] = False
        choice = settings, np.array(sorted(stop_tokens), np.int32)
        # Devices get copies of which rows have ended: on CPU they may read an array of NumPy's in place, while more ends are noted in it.
        tokens, done = _choose(self._logits, self._ended.copy(), self._keys, self._drawn, *choice)
        self._logits = None
        for left in range(max_new_tokens - 1, -1, -1):
            self._drawn += 1
            given = tokens
            if left:
                done = done | self._ended.copy()
                tokens, done, self._cache = self._programs.step(self._params, self._cache, given, done, self._keys, self._drawn, *choice)
            given = np.asarray(given)
            if not left:
                told = zip(given.tolist(), self._ended, strict=True)
                self._unread = [() if ended or token in stop_tokens else (token,) for token, ended in told]
            yield given
            if self._ended.all():
                return

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        rows, vocabulary = len(self.lengths), self.model.config.vocabulary
        if len(prompts) != rows:
            raise ValueError(f"prompts has {len(prompts)} rows, needs {rows}")
        for row, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompts[{row}] is empty, needs at least one token")
            wrong = [token for token in prompt if not 0 <= token < vocabulary]
            if wrong:
                raise ValueError(f"prompts[{row}] holds token {wrong[0]}, needs tokens from 0 to {vocabulary - 1}, the model's vocabulary")

    def _note(self, row: int, tokens: Sequence[int]) -> None:
        self.lengths[row] += len(tokens)
        self._recent[row] = (*self._recent[row], *tokens)[-CONTEXT:]

    def _reserve(self, more: int) -> None:
        """Make room for ``more`` tokens in every row."""
        slots = ring_slots(self.model, int(self.lengths.max()) + more)
        if self._cache is None:
            self._cache = self._programs.empty(self._params, len(self.lengths), slots)
        elif slots > self._slots:
            self._cache = caches.grow(self._cache, slots)
        self._slots = max(self._slots, slots)


def ring_slots(model: Model, tokens: int) -> int:
    """Keys and values to keep room for: all ``tokens`` and a few more, so that compiles are few, or a window and the chunk being read."""
    if "attention" not in model.config.layer_kinds:
        return 0
    step = max(64, 1 << (tokens - 1).bit_length() >> 3)
    rounded = -(-tokens // step) * step
    window = model.config.full_attention.window
    return rounded if window is None else min(rounded, window + CHUNK)


class Programs(NamedTuple):
    """Compiled functions of one model's parameters."""

    empty: Callable  # (params, rows, slots) -> a cache
    read: Callable  # (params, tokens [B,T], real [B,T], cache) -> (logits of what follows [B,vocabulary], cache)
    step: Callable  # (params, cache, tokens [B], done [B], ...) -> (the next tokens, done, cache): read one each and choose the next


def _prepare(model: Model) -> tuple[Programs, nnx.State]:
    """The model's programs, and its parameters with those weights in the compute dtype that would be cast to it at every use."""
    graph, params = nnx.split(model)
    weights = {path for path, module in nnx.iter_modules(model) if isinstance(module, (Linear, Embedding))}
    dtype = jnp.dtype(model.config.dtype)
    flat = [(path, leaf.replace(leaf[...].astype(dtype)) if path[:-1] in weights else leaf) for path, leaf in nnx.to_flat_state(params)]
    return _programs(graph), nnx.from_flat_state(flat)


@lru_cache(maxsize=8)
def _programs(graph: nnx.GraphDef) -> Programs:
    def empty(params, rows, slots):
        return nnx.merge(graph, params).empty_cache(rows, slots)

    def read(params, tokens, real, cache):
        model = nnx.merge(graph, params)
        hidden, cache = model.extend(tokens, real, cache)
        return model.logits(hidden[:, -1]), cache

    def step(params, cache, tokens, done, *choice):
        logits, cache = read(params, tokens[:, None], ~done[:, None], cache)
        return *_choose(logits, done, *choice), cache

    return Programs(
        jax.jit(empty, static_argnums=(1, 2)), jax.jit(read, donate_argnames="cache"), jax.jit(step, donate_argnames="cache")
    )


@jax.jit
def _choose(logits, done, keys, drawn, settings: Sampling, stop_tokens):
    """(the next token of each row, which rows have come to a stop token by now); ``drawn`` numbers the draws of a row."""
    tokens = sample(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, drawn), settings)
    return tokens, done | jnp.isin(tokens, stop_tokens)


def _are_texts(prompts) -> bool:
    """Whether prompts are texts, and not lists of tokens. Raises ValueError where they are neither, both or none."""
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(f"prompts is {prompts!r}, needs a list of texts or of lists of tokens, at least one")
    kinds = {isinstance(prompt, str) for prompt in prompts}
    if len(kinds) > 1:
        raise ValueError("prompts mixes texts and lists of tokens, needs one kind")
    return kinds.pop()
