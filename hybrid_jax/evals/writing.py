"""What a model writes after prompts of tokens, many of them, as texts."""

from collections.abc import Sequence
from functools import partial

import jax

from hybrid_jax.evals.processes import on_local_devices, rows_at_once, shared, watched
from hybrid_jax.generation import Session
from hybrid_jax.model import Model
from hybrid_jax.sampling import Sampling


def write(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    settings: Sampling,
    stop: Sequence[str],
    batch: int,
    what: str = "writing",
) -> list[str]:
    """The text after each prompt: up to a string of ``stop``, the end of a document or ``max_new_tokens`` tokens.

    ``batch`` prompts are written on at one time, of like lengths, by each device of each process of a run. With a greedy ``settings``
    a text is the same in any company; draws are not. ``what``: the title of the bar in a terminal.
    """
    return shared(partial(_local, model, max_new_tokens, settings, stop, batch, what), prompts, size=len)


def _local(model: Model, max_new_tokens, settings, stop, batch, what, prompts: list[Sequence[int]]) -> list[str]:
    mesh, model = on_local_devices(model)
    together = rows_at_once(mesh, batch, len(prompts))
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    texts = [""] * len(prompts)
    for first in watched(range(0, len(order), together), what):
        rows = order[first : first + together]
        of_batch = [prompts[i] for i in rows + rows[:1] * (together - len(rows))]  # the last one filled up, so that all compile as one
        longest = len(of_batch[0])
        with jax.set_mesh(mesh):
            session = Session(model, together, seed=first * jax.process_count() + jax.process_index())  # each batch draws its own
            session.read(of_batch, room=(1 << (longest + max_new_tokens - 1).bit_length()) - longest)  # for the same reason
            for row, piece in session.write(max_new_tokens, settings, stop=stop):
                if row < len(rows):
                    texts[rows[row]] += piece
    return texts
