"""A run's folder: which run it holds, and whether there is room for it.

WORKDIR/config.json          what the run is
WORKDIR/checkpoints/STEP/    Orbax
WORKDIR/metrics.jsonl        a line for each logged step and each evaluation; tensorboard/ holds the same
WORKDIR/eval-STEP.json       an evaluation in full
WORKDIR/summary.json, summary.png
WORKDIR/compiled/            programs, for the next start on such devices
"""

import json
import os
import shutil
from pathlib import Path

from hybrid_jax.config import CheckpointConfig, ConfigError, RunConfig, from_dict, to_dict

# What of its model makes no difference to parameters that a run is given at its start, and starts from.
GIVEN = ("model.dtype", "model.remat", "model.init_std")
# What may change between two starts of one run: how it is watched, kept and spread over devices, not what it computes.
FREE = ("train.microbatch", "train.log_every", "train.bad_steps", "model.remat", "evaluation", "checkpoint", "mesh", "log", "platform")


class RunError(RuntimeError):
    """A run that can not go on; the message says why, what is safe and what to do."""


def claim(workdir: Path, config: RunConfig) -> None:
    """Make ``workdir`` the folder of the run ``config``.

    Raises ConfigError where it has checkpoints of a run that computes something else, or can not be written to.
    """
    file = workdir / "config.json"
    if steps := saved_steps(workdir):
        untrained = steps == [0]  # given parameters, and no step taken from them: only the model is settled
        refused = [
            (path, old, new)
            for path, old, new in differences(read_config(workdir), config)
            if not (is_free(path) or untrained and (path in GIVEN or not path.startswith("model.")))
        ]
        if refused:
            shown = "; ".join(f"{path}: {old!r} -> {new!r}" for path, old, new in refused)
            raise ConfigError(
                f"{workdir} holds a run of another configuration ({shown}): "
                "give another --workdir for this one, or the same configuration to continue that one"
            )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        new = workdir / f"config.{os.getpid()}.tmp"
        new.write_text(json.dumps(to_dict(config), indent=2) + "\n")
        new.replace(file)
    except OSError as error:
        raise ConfigError(f"can not write to {workdir}: {error.strerror}; give another --workdir") from None


def keep_programs(workdir: Path) -> None:
    """Keep what JAX compiles in ``workdir``, unless it was told of another place (JAX_COMPILATION_CACHE_DIR); before it is used.

    A run that goes on with the same devices then compiles nothing.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))


def saved_steps(workdir: Path) -> list[int]:
    """The steps that have a checkpoint, whether or not it can be read."""
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").glob("*") if folder.name.isdigit())


def read_config(workdir: Path) -> RunConfig:
    """The configuration of the run in ``workdir``. Raises ConfigError where there is none."""
    file = Path(workdir) / "config.json"
    try:
        return from_dict(RunConfig, json.loads(file.read_text()))
    except FileNotFoundError:
        raise ConfigError(f"{workdir} holds no run: it has no config.json; give the --workdir of a training run") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not JSON ({error}): put it back from a copy, or give another --workdir") from None


def differences(old: RunConfig, new: RunConfig) -> list[tuple[str, object, object]]:
    """(dotted path, old value, new value) of every field in which two configurations differ; None where one has it not."""
    before, after = _flat(to_dict(old)), _flat(to_dict(new))
    return [(path, before.get(path), after.get(path)) for path in {**before, **after} if before.get(path) != after.get(path)]


def _flat(values: dict, prefix: str = "") -> dict:
    pairs = {}
    for name, value in values.items():
        pairs.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return pairs


def is_free(path: str) -> bool:
    """Whether runs that differ in the field at ``path`` alone are one run, started differently."""
    return any(path == free or path.startswith(free + ".") for free in FREE)


def evaluation_file(workdir: Path, step: int) -> Path:
    """Where the evaluation of a step is."""
    return workdir / f"eval-{step}.json"


def finished(workdir: Path, steps: int) -> bool:
    """Whether the run in ``workdir`` has come to its end and said so."""
    return saved_steps(workdir)[-1:] == [steps] and (workdir / "summary.json").exists()


def check_room(workdir: Path, config: CheckpointConfig, one: int) -> None:
    """Raise ConfigError where the disk can not hold the checkpoints still to come, of ``one`` bytes each.

    One more than are kept: a new one is whole before an old one goes.
    """
    need = max(1, config.keep + 1 - len(saved_steps(workdir))) * one
    free = shutil.disk_usage(workdir).free
    if need > free:
        raise ConfigError(
            f"{workdir} has {gigabytes(free)} free, and the run's checkpoints need {gigabytes(need)} ({gigabytes(one)} each): "
            f"make room, give a --workdir on another disk, or keep fewer (--config.checkpoint.keep, now {config.keep})"
        )


def gigabytes(size: int) -> str:
    """Bytes for people, such as "4.2 GB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
