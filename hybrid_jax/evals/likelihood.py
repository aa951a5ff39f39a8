"""How likely a model finds continuations of contexts.

Requests share rows, each a segment of its own, at whose start every operator begins anew: a likelihood is the same in any
company. Rows are as long as a power of two, so that compilations are few, and logits exist for a block of positions at a time.
"""

import bisect
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from hybrid_jax.evals.processes import on_local_devices, shared, watched
from hybrid_jax.loss import token_losses
from hybrid_jax.model import Model
from hybrid_jax.sharding import batch_sharding

Request = tuple[Sequence[int], Sequence[int]]  # the tokens of a context and of its continuation
ROW = 512  # tokens of a row that holds short requests alone
LOGITS = 4096  # positions of each device that have logits at one time


class Likelihood(NamedTuple):
    """Of a continuation: the sum of its tokens' log-probabilities, in nats, and whether each of them is the likeliest, alone."""

    log_probability: float
    greedy: bool


def log_likelihoods(model: Model, requests: Sequence[Request], *, max_length: int = 2048, batch: int = 8) -> list[Likelihood]:
    """The Likelihood of each continuation after its context.

    requests: (context, continuation), token ids, each of one at least. What is left of a context is its end, where it and the
        continuation, but for the last token, are more than ``max_length`` tokens.
    batch: rows of ``max_length`` tokens that each device computes at one time; of shorter rows more.

    Rows are spread over the local devices; in a run of several processes, each is to be given all requests, computes its share
    of them and returns all results. Raises ValueError for a request without tokens, with ones that are not in the vocabulary,
    or with a continuation longer than ``max_length``.
    """
    for number, request in enumerate(requests):
        _check(number, *request, max_length, model.config.vocabulary)
    requests = [(*context, *continuation)[-max_length - 1 :] + (len(continuation),) for context, continuation in requests]
    found = shared(partial(_local, model, max_length=max_length, batch=batch), requests, size=len)
    return [Likelihood(*pair) for pair in found]


def _check(number: int, context: Sequence[int], continuation: Sequence[int], max_length: int, vocabulary: int) -> None:
    for name, tokens in (("context", context), ("continuation", continuation)):
        if not len(tokens):
            raise ValueError(f"request {number} has an empty {name}, needs one token at least")
        wrong = [token for token in tokens if not 0 <= token < vocabulary]
        if wrong:
            raise ValueError(f"request {number} holds token {wrong[0]}, needs tokens from 0 to {vocabulary - 1}, the model's vocabulary")
    if len(continuation) > max_length:
        raise ValueError(f"request {number} has a continuation of {len(continuation)} tokens, needs at most max_length, {max_length}")


def _local(model: Model, requests: list[tuple[int, ...]], max_length: int, batch: int) -> list[tuple[float, bool]]:
    """Of requests (tokens..., how many of them are scored): what :func:`log_likelihoods` gives, computed by this process alone."""
    mesh, model = on_local_devices(model)
    graph, params = nnx.split(model)
    longest = 1 << (max_length - 1).bit_length()
    results: list[tuple[float, bool]] = [None] * len(requests)

    def collect(places, outputs) -> None:
        losses, greedy = jax.device_get(outputs)
        for number, row, stop in places:
            scored = row, slice(stop - requests[number][-1], stop)
            results[number] = -float(losses[scored].sum(dtype=np.float64)), bool(greedy[scored].all())

    with jax.set_mesh(mesh):
        ahead = None  # the batch that the devices are computing while the host prepares the next
        for width, count, rows in watched(_plan(requests, min(ROW, longest), batch * longest * mesh.size), "scoring"):
            places, arrays = _fill(requests, width, count, rows)
            outputs = _score(graph, params, jax.device_put(arrays, batch_sharding(mesh)))
            if ahead:
                collect(*ahead)
            ahead = places, outputs
        if ahead:
            collect(*ahead)
    return results


@partial(jax.jit, static_argnums=0)
def _score(graph: nnx.GraphDef, params: nnx.State, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(the loss of each token, whether it is the likeliest), both [B,T] float32."""
    model = nnx.merge(graph, params)
    hidden = model.hidden(batch["tokens"], batch["segment_ids"])
    rows = hidden.shape[0] // jax.sharding.get_abstract_mesh().size
    return token_losses(hidden, model.output_kernel(), batch["targets"], block=max(1, LOGITS // rows))


def _plan(requests: list[tuple[int, ...]], shortest: int, tokens: int) -> list[tuple[int, int, list[list[int]]]]:
    """Batches of ``tokens`` tokens: (length of a row, rows, which requests those hold that hold any)."""
    rows, plan = pack([len(request) - 2 for request in requests], shortest), []
    for width in sorted({width for width, _ in rows}, reverse=True):  # the longest first: what does not fit fails at once
        of_width, count = [numbers for w, numbers in rows if w == width], tokens // width
        plan += [(width, count, of_width[first : first + count]) for first in range(0, len(of_width), count)]
    return plan


def _fill(requests: list[tuple[int, ...]], width: int, count: int, rows: list[list[int]]) -> tuple[list, dict[str, np.ndarray]]:
    """A batch: ((request, row, the place after its last target), ...) and its arrays, each [count,width] int32."""
    places, arrays = [], {name: np.zeros((count, width), np.int32) for name in ("tokens", "targets", "segment_ids")}
    for row, numbers in enumerate(rows):
        start = 0
        for segment, number in enumerate(numbers, 1):
            *sequence, _ = requests[number]
            stop = start + len(sequence) - 1
            arrays["tokens"][row, start:stop], arrays["targets"][row, start:stop] = sequence[:-1], sequence[1:]
            arrays["segment_ids"][row, start:stop] = segment
            places.append((number, row, stop))
            start = stop
    return places, arrays


def pack(lengths: Sequence[int], shortest: int) -> list[tuple[int, list[int]]]:
    """Rows that hold sequences of ``lengths``: (length, a power of two of at least ``shortest``, the indices of what it holds).

    The longest sequences first, each where it leaves the least room, or in a row of the first length that holds it.
    """
    rows, space = [], []  # space: (room left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(space, (lengths[i], 0))
        if at < len(space):
            room, row = space.pop(at)
        else:
            room, row = max(shortest, 1 << (lengths[i] - 1).bit_length()), len(rows)
            rows.append((room, []))
        rows[row][1].append(i)
        bisect.insort(space, (room - lengths[i], row))
    return rows
