"""Orbax checkpoints of a run: saved in the background, kept by policy, restored on any mesh, with a way back from a broken one."""

import itertools
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from hybrid_jax.amounts import gigabytes
from hybrid_jax.config import CheckpointConfig, ConfigError, OptimizerConfig, RunConfig
from hybrid_jax.distributed import gather
from hybrid_jax.storage import in_bucket
from hybrid_jax.train.optimizer import evaluation_params
from hybrid_jax.train.step import TrainState, abstract_state, state_bytes
from hybrid_jax.train.workdir import RunError

TRIES = 3  # to read a checkpoint, before it is taken for broken: storage may fail for a moment
PAUSE = 5.0  # seconds between them


class Checkpoints:
    """The checkpoints in WORKDIR/checkpoints, by step. Close it, or use it as a context: the last save ends there."""

    def __init__(
        self, workdir: epath.Path, config: CheckpointConfig | None = None, *, for_good: int = 0, reading: ocp.Context | None = None
    ):
        """``config`` says which are kept, for a run that saves; without it nothing in the folder is changed.

        for_good: a step whose checkpoint is kept too. reading: Orbax's settings to read with.
        """
        self.folder = (workdir if in_bucket(workdir) else workdir.absolute()) / "checkpoints"
        self._reading = _alone(reading)
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(config.keep)] if config else [policies.PreserveAll()]
        if config and config.keep_every:
            kept.append(policies.EveryNSteps(config.keep_every))
        if for_good:
            kept.append(policies.CustomSteps([for_good]))
        self._orbax = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=config is not None,  # what a kill left half-written
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        try:
            self._orbax.close()
        except Exception as error:
            raise self._explained(error) from error

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def save(self, state: TrainState) -> None:
        """Start saving ``state``; returns once its arrays are copied. Raises RunError where this or the last save cannot be written."""
        step = int(state.step)
        try:
            self._orbax.save_checkpointables_async(step, _checkpointables(state), force=True)
        except Exception as error:
            raise self._explained(error, step, state_bytes(state)) from error

    def save_params(self, params: nnx.State) -> None:
        """Save parameters alone as step 0, for a run that starts from them with a fresh optimiser; returns when they are written.

        Raises RunError where they cannot be.
        """
        try:
            self._orbax.save_checkpointables(0, {"params": params})
        except Exception as error:
            raise self._explained(error, 0, state_bytes(params)) from error

    def wait(self) -> None:
        """Return when the last save is whole. Raises RunError where it could not be written."""
        try:
            self._orbax.wait()
        except Exception as error:
            raise self._explained(error) from error

    def restore(self, state: TrainState) -> tuple[TrainState | nnx.State | None, list[str]]:
        """The newest state that can be read, placed as the shapes in ``state`` say, and warnings.

        Of a run that starts from given parameters (:meth:`save_params`) these alone; None where there is no checkpoint yet.
        A checkpoint that one of the processes cannot read is told of and moved to WORKDIR/unreadable-STEP, or -2 and so on after
        that. Raises RunError if none can.
        """
        broken: dict[int, str] = {}
        for step in reversed(self.steps):
            loaded, why = self._read(step, _checkpointables(state))
            if loaded is None:
                broken[step] = why
                continue
            told = [self._move_aside(bad, why, step) for bad, why in broken.items()]
            if told:
                self._orbax.reload()
            if loaded.keys() == {"params"}:
                return loaded["params"], told
            return TrainState(loaded["params"], loaded["opt_state"], **loaded["counters"]), told
        if broken:
            shown = "; ".join(f"step {step}: {why}" for step, why in broken.items())
            raise RunError(f"no checkpoint in {self.folder} can be read ({shown}): put one back, or start anew in another --workdir")
        return None, []

    def load(self, step: int | None, items: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The step read (the newest for None) and the named parts of its checkpoint, placed as the shapes in ``items`` say.

        Of parameters that a run was given (:meth:`save_params`) these alone.

        Raises ConfigError where there is no such checkpoint or it cannot be read.
        """
        if not self.steps:
            raise ConfigError(f"{self.folder} holds no checkpoint yet")
        if step is not None and step not in self.steps:
            raise ConfigError(f"{self.folder} has no checkpoint of step {step}; it has {', '.join(map(str, self.steps))}")
        for candidate in [step] if step is not None else reversed(self.steps):
            loaded, why = self._read(candidate, items)
            if loaded is not None:
                return candidate, loaded
            warnings.warn(f"the checkpoint of step {candidate} in {self.folder} cannot be read ({why})", stacklevel=3)
        raise ConfigError(f"no checkpoint asked for in {self.folder} can be read ({why}); it has {', '.join(map(str, self.steps))}")

    def _read(self, step: int, items: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
        """The named parts of a checkpoint; None, and why, where one of the processes could not read its share.

        Each reads on its own, and then all are told how the others fared: in Orbax's own barriers the rest would wait for the one that
        failed. Out of memory says nothing of a checkpoint, and is raised.
        """
        for attempt in range(1, TRIES + 1):
            loaded, why = None, ""
            try:
                with self._reading:
                    folder = self.folder / str(step)
                    held = items if step else ocp.checkpointables_metadata(folder).metadata  # given parameters stand alone
                    loaded = ocp.load_checkpointables(folder, {name: x for name, x in items.items() if name in held})
            except Exception as error:  # each layer of storage has errors of its own
                if any(isinstance(e, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(e) for e in _chain(error)):
                    raise
                why = reason(error)
            failed = [found.decode() for found in gather(why.encode()) if found]
            if not failed:
                return loaded, ""
            if attempt < TRIES:
                time.sleep(PAUSE)
        return None, failed[0]

    def _move_aside(self, step: int, why: str, instead: int) -> str:
        names = (f"unreadable-{step}" + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
        aside = next(path for path in map(self.folder.parent.joinpath, names) if not path.exists())
        if jax.process_index() == 0:
            (self.folder / str(step)).rename(aside)
        multihost_utils.sync_global_devices(f"step {step} moved aside")  # the others then see the folder without it
        return f"the checkpoint of step {step} cannot be read ({why}): it is now {aside}, and the run goes on from step {instead}"

    def _explained(self, error: Exception, step: int | None = None, size: int | None = None) -> RunError:
        whole = self.steps[-1] if self.steps else None
        safe = "there is none yet" if whole is None else f"the checkpoint of step {whole} is whole, and the same command goes on from there"
        if is_full_disk(error):
            room = f" (one takes {gigabytes(size)})" if size else ""
            return RunError(f"no space left to write a checkpoint in {self.folder}{room}; {safe}: make room and start again")
        return RunError(f"a checkpoint could not be written in {self.folder} ({reason(error)}); {safe}")


def _alone(settings: ocp.Context | None) -> ocp.Context:
    """Orbax's ``settings`` for reading without waiting for other processes."""
    alone = ocp.Context(settings)
    alone.multiprocessing.primary_host = jax.process_index()
    alone.multiprocessing.active_processes = {jax.process_index()}
    return alone


def is_full_disk(error: BaseException) -> bool:
    """Whether ``error``, or what it came from, says that a disk is full."""
    return any("No space left" in str(e) or "RESOURCE_EXHAUSTED" in str(e) or "Disk quota exceeded" in str(e) for e in _chain(error))


def reason(error: BaseException) -> str:
    """What lies at the root of an error, in one short line."""
    root = list(_chain(error))[-1]
    text = " ".join(str(root).split()) or type(root).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def _chain(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _checkpointables(state: TrainState) -> dict[str, Any]:
    counters = {name: getattr(state, name) for name in ("step", "skipped", "skipped_in_a_row")}
    return {"params": state.params, "opt_state": state.opt_state, "counters": counters}


def load_params(workdir: epath.Path, config: RunConfig, mesh: Mesh, step: int | None = None) -> tuple[int, nnx.State]:
    """(step, the parameters to evaluate) of the checkpoint of ``step``, or the newest that can be read, laid out on ``mesh``."""
    items = to_evaluate(config.optimizer, abstract_state(config, mesh).state)
    with Checkpoints(workdir) as checkpoints:
        step, loaded = checkpoints.load(step, items)
    return step, evaluation_params(config.optimizer, loaded["params"], loaded.get("opt_state"))


def to_evaluate(config: OptimizerConfig, state: TrainState, wanted: Callable[[nnx.State], nnx.State] = lambda tree: tree) -> dict[str, Any]:
    """The parts of a checkpoint that `evaluation_params` is of, for `Checkpoints.load`; of the parameters those that ``wanted`` leaves.

    Schedule-free's average is not stored: it follows from the two sequences that are.
    """
    if config.name != "schedule_free":
        return {"params": wanted(state.params)}
    *others, free = jax.tree.map(lambda _: ocp.PLACEHOLDER, state.opt_state)
    needed = state.opt_state[-1]
    return {"params": wanted(state.params), "opt_state": (*others, free._replace(b1=needed.b1, z=wanted(needed.z)))}
