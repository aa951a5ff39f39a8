"""Batches for training and evaluation, a function of (seed, step) alone.

Row r of a run, counted over all steps, is fixed by the seed: row i of the batch of step s is row ``s * batch + i``, whatever
ran before and whichever process builds it. So a run can start at any step, and go on with another number of processes.

Every token of the text is a target exactly once an epoch. What the model sees before the first token of the text, and with
packed documents before the first of each, is ``document_end``. So one definition serves training and evaluation, and with
packed documents nothing is predicted from another document's text.
"""

import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import grain
import numpy as np
from grain.experimental import index_shuffle

from hybrid_jax.data import DataError, mqar
from hybrid_jax.data.token_source import TokenSource

PACKINGS = ("windows", "documents")
THREADS = 4  # that build batches ahead
Pieces = list[tuple[int, int]]  # ranges of the source's tokens, the targets of one row
Batch = dict[str, np.ndarray]


def training_batches(
    source: TokenSource,
    *,
    batch: int,
    window: int,
    seed: int,
    packing: str = "windows",
    mqar_tasks: Sequence[mqar.Task] = (),
    mqar_share: float = 0.0,
    start_step: int = 0,
    local: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Endless batches from ``start_step`` on: the b rows ``local`` of each, from 0 (None: all of them), of T = window tokens.

    ``packing`` "windows" cuts the documents, laid end to end as they are in the source, into windows of T tokens, one segment
    each, and shuffles the windows anew each epoch. "documents" shuffles the documents, lays them end to end, cuts the row at
    every T tokens and gives each document in a row a segment id; one longer than its row goes on in another, as a segment of
    its own. In both a last window that is not full is left out of the epoch. Of a mix each part has its share of the rows of text, spread
    evenly, and epochs of its own: its rows are, in their order, those that it has alone.

    A share ``mqar_share`` of all rows, spread evenly, hold MQAR problems in place of text, of each of ``mqar_tasks`` in turn.

    Returns a Grain iterator (``close()`` it) over ``tokens``, ``targets``, ``segment_ids`` [b,T] int32 (0 is padding) and
    ``weights`` [b,T] float32, built ahead by `THREADS` threads.

    Raises `DataError` where the window is longer than the source, or the MQAR task does not fit.
    """
    local = _local_rows(batch, window, packing, local)
    for part, _ in source.parts:
        if len(part) < window:
            raise DataError(f"a window of {window} tokens, but {part.name} holds {len(part)}: make the window shorter or give more text")
    if not 0.0 <= mqar_share <= 1.0 or (mqar_share and not mqar_tasks):
        raise DataError(f"an MQAR share of {mqar_share} with {len(mqar_tasks)} tasks: give a share from 0 to 1, and above 0 a task")
    for task in mqar_tasks:
        task.check(window, source.tokenizer.vocabulary)
    shuffled = ShuffledMix(source, window, seed, ShuffledWindows if packing == "windows" else ShuffledDocuments)
    recall = Mixture(mqar_share, seed)
    vocabulary, recall_seed = source.tokenizer.vocabulary, _stream(seed, "mqar")

    def build(index: int) -> Batch:
        rows = []
        for row in ((start_step + index) * batch + i for i in local):
            before = recall.count(row)
            if recall.count(row + 1) > before:
                task = mqar_tasks[before % len(mqar_tasks)]
                rows.append(mqar.row(task, recall_seed, before, window=window, vocabulary=vocabulary))
            else:
                rows.append(shuffled.pieces(row - before))
        return _fill(source, rows, window)

    return _iterate(build, sys.maxsize)


def evaluation_batches(
    source: TokenSource,
    *,
    batch: int,
    window: int,
    packing: str = "windows",
    tokens: int | None = None,
    local: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """The first ``tokens`` of ``source`` (None: all) in order, every token a target exactly once; the same batches every time.

    Rows are consecutive windows of T = window tokens, ``packing`` says whether each is one segment or its documents are told
    apart. What is missing at the end, of the last window and of the last batch, is padding of weight 0. Otherwise as
    `training_batches`.
    """
    local = _local_rows(batch, window, packing, local)
    if len(source) == 0:
        raise DataError(f"{source.name} is empty: there is nothing to evaluate on")
    size = len(source) if tokens is None else min(tokens, len(source))
    windows = -(-size // window)

    def pieces(row: int) -> Pieces:
        start, stop = min(row * window, size), min((row + 1) * window, size)
        if packing == "windows":
            return [(start, stop)] if start < stop else []
        first, last = np.searchsorted(source.documents, [start, stop], side="right")
        cuts = [start, *source.documents[first:last].tolist(), stop]
        return [(a, b) for a, b in zip(cuts, cuts[1:], strict=False) if a < b]

    def build(step: int) -> Batch:
        return _fill(source, [pieces(step * batch + i) for i in local], window)

    return _iterate(build, -(-windows // batch))


def mqar_evaluation_batches(
    task: mqar.Task,
    *,
    rows: int,
    batch: int,
    window: int,
    vocabulary: int,
    local: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """``rows`` rows of held-out MQAR problems, the same ones for every run; the last batch filled up with padding."""
    local = _local_rows(batch, window, "documents", local)
    task.check(window, vocabulary)
    seed = _stream(0, "mqar evaluation")

    def problems(row: int) -> Pieces | Batch:
        return mqar.row(task, seed, row, window=window, vocabulary=vocabulary) if row < rows else []

    def build(step: int) -> Batch:
        return _fill(None, [problems(step * batch + i) for i in local], window)

    return _iterate(build, -(-rows // batch))


class Mixture:
    """Which rows of a run are of a kind, such as MQAR: ``share`` of them, spread evenly from a place that the seed chooses for that kind.

    Exact for any row: fixed-point integers, so that nothing is lost after 10^9 rows.
    """

    ONE = 1 << 32

    def __init__(self, share: float, seed: int, kind: str = "mixture"):
        self.share = round(share * self.ONE)
        self.offset = _stream(seed, kind) % self.ONE

    def count(self, row: int) -> int:
        """How many rows before ``row`` are of it; row ``row`` is where ``count(row + 1)`` is one more."""
        return (row * self.share + self.offset) // self.ONE


class ShuffledMix:
    """Text row -> the part of ``source`` that it is of, and there that part's next row, as ``shuffled`` (one of the two below) says.

    The first part takes its share of all rows, the second its share of those left, and so on; the last all that are left.
    """

    def __init__(self, source: TokenSource, window: int, seed: int, shuffled: Callable[[TokenSource, int, int], Any]):
        shares = [share for _, share in source.parts]
        starts = itertools.accumulate((len(part) for part, _ in source.parts), initial=0)
        self.parts = [
            (Mixture(share / sum(shares[i:]), seed, f"part {i}"), shuffled(part, window, seed), start)
            for i, ((part, share), start) in enumerate(zip(source.parts, starts, strict=False))
        ]

    def pieces(self, row: int) -> Pieces:
        for mixture, shuffled, start in self.parts:
            before = mixture.count(row)
            if mixture.count(row + 1) > before:
                return [(start + first, start + last) for first, last in shuffled.pieces(before)]
            row -= before
        raise AssertionError(f"the last part takes all rows that are left, and not row {row}")


class ShuffledWindows:
    """Text row -> one window of the token stream, each once an epoch."""

    def __init__(self, source: TokenSource, window: int, seed: int):
        self.window, self.seed = window, seed
        self.rows = len(source) // window  # an epoch

    def pieces(self, row: int) -> Pieces:
        epoch, row = divmod(row, self.rows)
        start = _shuffle(row, self.rows, self.seed, epoch) * self.window
        return [(start, start + self.window)]


class ShuffledDocuments:
    """Text row -> the documents, or parts of them, that a row holds; each token once an epoch, but for the last row not full.

    Takes 16 bytes a document, and 12 more for each of the one or two epochs in use.
    """

    def __init__(self, source: TokenSource, window: int, seed: int):
        self.window, self.seed = window, seed
        self.rows = len(source) // window
        self.ends = source.documents
        self.lengths = np.diff(self.ends, prepend=0)
        self._epoch = lru_cache(maxsize=2)(self._order)  # two: batches built ahead may be in the next epoch
        self._lock = threading.Lock()

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.Generator(np.random.Philox(_stream(self.seed, f"documents {epoch}")))
        order = rng.permutation(len(self.lengths)).astype(np.uint32)
        return order, np.cumsum(self.lengths[order])

    def pieces(self, row: int) -> Pieces:
        epoch, row = divmod(row, self.rows)
        with self._lock:
            order, ends = self._epoch(epoch)
        # The parts of a long document are in neighbouring rows: shuffled too, so that they do not share a batch.
        start = _shuffle(row, self.rows, self.seed, epoch) * self.window
        first, last = np.searchsorted(ends, [start, start + self.window - 1], side="right")
        pieces = []
        for place in range(first, last + 1):
            document = order[place]
            shift = int(self.ends[document] - ends[place])  # from the laid-out row to the source
            begin = max(start, int(ends[place] - self.lengths[document]))
            stop = min(start + self.window, int(ends[place]))
            pieces.append((begin + shift, stop + shift))
        return pieces


def _fill(source: TokenSource | None, rows: list[Pieces | Batch], window: int) -> Batch:
    """Rows side by side: the pieces read from ``source``, all at once, and the rows that are already made."""
    out = {name: np.zeros((len(rows), window), np.int32) for name in ("tokens", "targets", "segment_ids")}
    out["weights"] = np.zeros((len(rows), window), np.float32)
    pieces = []  # (row, column, segment, start, stop)
    for r, row in enumerate(rows):
        if isinstance(row, dict):
            for name, values in row.items():
                out[name][r] = values
            continue
        column = 0
        for segment, (start, stop) in enumerate(row, 1):
            pieces.append((r, column, segment, start, stop))
            column += stop - start
    if not pieces:
        return out
    # One token more on the left: what the first target of a piece is predicted from.
    reads = source.read_ranges([(max(start - 1, 0), stop) for *_, start, stop in pieces])
    for (r, column, segment, start, stop), tokens in zip(pieces, reads, strict=True):
        here = (r, slice(column, column + stop - start))
        out["targets"][here] = tokens[-(stop - start) :]
        out["tokens"][r, column] = tokens[0] if start > 0 else source.tokenizer.document_end
        out["tokens"][r, column + 1 : column + stop - start] = tokens[-(stop - start) : -1]
        out["segment_ids"][here] = segment
        out["weights"][here] = 1.0
    return out


class _Steps:
    """A random-access data source for Grain: ``build(step)`` for every step."""

    def __init__(self, build, steps: int):
        self._build, self._steps = build, steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        return self._build(step)


def _iterate(build, steps: int) -> Iterator[Batch]:
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=2 * THREADS)
    return iter(grain.MapDataset.source(_Steps(build, steps)).to_iter_dataset(options))


def _shuffle(row: int, rows: int, seed: int, epoch: int) -> int:
    """Where ``row`` of ``rows`` goes in ``epoch``: a permutation that needs no memory."""
    return index_shuffle(row, max_index=rows - 1, seed=_stream(seed, f"rows {epoch}") % (1 << 32), rounds=4)


@lru_cache(maxsize=64)
def _stream(seed: int, purpose: str) -> int:
    """A 64-bit seed of its own for each use of ``seed``, so that no two draw the same numbers."""
    return int(np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1, np.uint64)[0])


def _local_rows(batch: int, window: int, packing: str, local: Sequence[int] | None) -> Sequence[int]:
    """``local``, or all rows of the batch. Raises `DataError` for a batch that cannot be made."""
    if batch < 1 or window < 1:
        raise DataError(f"a batch of {batch} rows of {window} tokens: both must be at least 1")
    if packing not in PACKINGS:
        raise DataError(f"packing {packing!r}: give one of {', '.join(PACKINGS)}")
    if local is None:
        return range(batch)
    if not all(0 <= row < batch for row in local):
        raise DataError(f"rows {list(local)} of a batch of {batch}: give rows from 0 to {batch - 1}")
    return local
