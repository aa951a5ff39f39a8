"""A run's folder, on a file system or in a bucket: which run it holds, and whether there is room for it.

WORKDIR/config.json          what the run is
WORKDIR/text.sha256          of the tokens that it is trained on
WORKDIR/checkpoints/STEP/    Orbax
WORKDIR/metrics.jsonl        a line for each logged step and each evaluation; tensorboard/ holds the same
WORKDIR/eval-STEP.json       an evaluation in full; eval-STEP-N-tokens.json one of another number of tokens, that was asked for
WORKDIR/summary.json, summary.png
WORKDIR/profile/             traces of the steps that were asked for
WORKDIR/wandb_id             of the run at Weights & Biases, where it is logged there
WORKDIR/compiled/            programs, for the next start on such devices
WORKDIR/lock                 held by the process that trains there
"""

import errno
import fcntl
import json
import os
import platform
import shutil
from typing import Any, TextIO

import fsspec
from etils import epath

from hybrid_jax.amounts import gigabytes
from hybrid_jax.config import ConfigError, RunConfig, from_dict, to_dict
from hybrid_jax.data.token_source import TokenSource
from hybrid_jax.storage import files, in_bucket, one_line, write_whole

# What of its model makes no difference to which parameters a run is given at its start, and starts from: how it computes, how its own
# would have begun, and, for a longer context, the positions and the window of full attention ("mixer": of a Transformer).
GIVEN = ("model.dtype", "model.remat", "model.init_std", "model.residual_init")
GIVEN += ("model.attention.rope_theta", "model.attention.window", "model.mixer.rope_theta", "model.mixer.window")
# What may change between two starts of one run: how it is watched, kept and spread over devices, not what it computes.
FREE = ("train.microbatch", "train.log_every", "train.bad_steps", "model.remat", "evaluation", "checkpoint", "mesh", "log", "platform")

_held: dict[str, TextIO] = {}  # the lock of each folder that this process has claimed, open until it ends


class RunError(RuntimeError):
    """A run that cannot go on; the message says why, what is safe and what to do."""


def claim(workdir: epath.Path, config: RunConfig, text: TokenSource | None = None) -> None:
    """Make ``workdir`` the folder of the run ``config``, until this process ends; of several processes the first writes that down.

    text: what it trains on. Raises ConfigError where ``workdir`` has checkpoints of a run that computes something else, or of other text,
    where another process trains in it, or where it cannot be written to.
    """
    import jax

    try:
        _check_rights(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            _hold(workdir)  # first, so that what is compared with below stays as it is
    except OSError as error:
        raise _unwritable(workdir, error) from None
    _check_same(workdir, config)
    try:
        if text is not None:
            check_text(workdir, text.name, text.fingerprint)
        if jax.process_index() == 0:
            write_whole(workdir / "config.json", json.dumps(to_dict(config), indent=2) + "\n")
    except OSError as error:
        raise _unwritable(workdir, error) from None


def _check_same(workdir: epath.Path, config: RunConfig) -> None:
    """Raise ConfigError where ``workdir`` has checkpoints of a run that computes something else."""
    steps = saved_steps(workdir)
    if not steps:
        return
    untrained = steps == [0]  # given parameters, and no step taken from them: only the model is settled
    before = read_config(workdir)
    settled, weights = set(), [list(run.data.sources.values()) for run in (before, config)]
    if (workdir / "text.sha256").exists() and weights[0] == weights[1]:
        settled |= {"data.source"}  # by `check_text`: the same tokens may lie elsewhere now
    if steps[-1] <= min(before.open_steps, config.open_steps):  # the learning rate was the same so far, wherever it ends
        settled |= {"train.steps", "optimizer.decay_steps", "optimizer.final_fraction"}
    refused = [
        f"{path}: {old!r} -> {new!r}"
        for path, old, new in differences(before, config)
        if not (is_free(path) or path in settled or untrained and (path in GIVEN or not path.startswith("model.")))
    ]
    if refused:
        raise ConfigError(
            f"{workdir} holds a run of another configuration ({'; '.join(refused)}): "
            "give another --workdir for this one, or the same configuration to continue that one"
        )


def _unwritable(workdir: epath.Path, error: OSError) -> ConfigError:
    return ConfigError(f"cannot write to {workdir}: {error.strerror or one_line(error)}; give another --workdir")


def _hold(workdir: epath.Path) -> None:
    """Keep others from training in ``workdir`` while this process runs: the system lets go of the lock however it ends.

    Raises ConfigError where another process holds it. Nothing is held in a bucket, or where the file system has no locks.
    """
    file = workdir / "lock"
    if in_bucket(workdir) or str(file) in _held:
        return
    lock = open(file, "a+")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return
        lock.seek(0)
        raise ConfigError(
            f"another process ({lock.read().strip()}) trains in {workdir}: give another --workdir, or wait until that one has ended; "
            f"should there be no such process, delete {file}"
        ) from None
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {platform.node()}\n")
    lock.flush()
    _held[str(file)] = lock


def check_text(workdir: epath.Path, name: str, fingerprint: str) -> None:
    """Raise ConfigError where the run was trained on other tokens than its source ``name`` holds now; else keep which they are."""
    import jax

    file = workdir / "text.sha256"
    if any(saved_steps(workdir)) and file.exists() and file.read_text().strip() != fingerprint:
        raise ConfigError(
            f"{workdir} was trained on other text than {name} holds now (another store in its place, or another Python's library): "
            "put that back, or give another --workdir"
        )
    if jax.process_index() == 0:
        write_whole(file, fingerprint + "\n")


def _check_rights(workdir: epath.Path) -> None:
    """Raise ConfigError where the bucket may be written to but not looked at, as Orbax does before it deletes an old checkpoint."""
    bucket = os.fspath(workdir).removeprefix("gs://").partition("/")[0]
    if in_bucket(workdir) and "kind" not in fsspec.filesystem("gcs").info(bucket):  # else what gcsfs made of a list of its objects
        raise ConfigError(
            f"this account may write to gs://{bucket} but not look at the bucket itself, which deleting old checkpoints needs: "
            f"give it roles/storage.legacyBucketReader (gcloud storage buckets add-iam-policy-binding gs://{bucket} ...)"
        )


def keep_programs(workdir: epath.Path) -> None:
    """Keep what JAX compiles in ``workdir``, unless it was told of another place (JAX_COMPILATION_CACHE_DIR); before it is used.

    A run that goes on with the same devices then compiles nothing.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
    if in_bucket(jax.config.jax_compilation_cache_dir):
        # What else is kept in that folder on GPUs is written by XLA itself, which knows no buckets.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def saved_steps(workdir: epath.Path) -> list[int]:
    """The steps that have a checkpoint, whether or not it can be read."""
    found = [path for path in files(workdir / "checkpoints", "*") if path.name.isdigit()]
    if in_bucket(workdir):  # where Orbax writes a checkpoint in its place, and this file last
        found = [path for path in found if (path / "commit_success.txt").exists()]
    return sorted(int(path.name) for path in found)


def read_config(workdir: epath.Path) -> RunConfig:
    """The configuration of the run in ``workdir``. Raises ConfigError where there is none."""
    file = workdir / "config.json"
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


def evaluation_file(workdir: epath.Path, step: int, tokens: int | None = None) -> epath.Path:
    """Where the evaluation of a step is: the run's own, or one of so many ``tokens``."""
    return workdir / (f"eval-{step}.json" if tokens is None else f"eval-{step}-{tokens}-tokens.json")


def write_evaluation(file: epath.Path, step: int, results: dict[str, Any]) -> None:
    """Write the evaluation of a step, to where ``read_evaluations`` finds it."""
    write_whole(file, json.dumps({"step": step, **results}, indent=2) + "\n")


def read_evaluations(workdir: epath.Path, step: int | None = None) -> dict[int, dict[str, Any]]:
    """{step: its evaluation, that of the most tokens}, in order; of all that were evaluated, or of one ``step``."""
    found = [json.loads(file.read_text()) for file in files(workdir, "eval-*.json" if step is None else f"eval-{step}[-.]*")]
    return {evaluation["step"]: evaluation for evaluation in sorted(found, key=lambda e: (e["step"], e["tokens"]))}


def finished(workdir: epath.Path, steps: int) -> bool:
    """Whether the run in ``workdir`` has come to its end, ``steps``, and said so."""
    file = workdir / "summary.json"  # which says of which end: the same run may have had fewer steps before
    return saved_steps(workdir)[-1:] == [steps] and file.exists() and json.loads(file.read_text())["step"] == steps


def check_room(workdir: epath.Path, config: RunConfig, one: int) -> None:
    """Raise ConfigError where the disk cannot hold the checkpoints still to come in a run, of ``one`` bytes each.

    One more than are kept: a new one is whole before an old one goes. A bucket has no end.
    """
    if in_bucket(workdir):
        return
    settings, opened = config.checkpoint, config.open_steps
    before = max(0, config.train.steps - settings.keep * settings.every)  # the newest are of later steps than this one
    older = before // settings.keep_every if settings.keep_every else 0  # and kept for good
    older += 0 < opened <= before and not (settings.keep_every and opened % settings.keep_every == 0)
    need = max(1, settings.keep + 1 + older - len(saved_steps(workdir))) * one
    free = shutil.disk_usage(workdir).free
    if need > free:
        raise ConfigError(
            f"{workdir} has {gigabytes(free)} free, and the run's checkpoints need {gigabytes(need)} ({gigabytes(one)} each): "
            f"make room, give a --workdir on another disk, or keep fewer (--config.checkpoint.keep, now {settings.keep}, "
            f"and .keep_every, now {settings.keep_every})"
        )
