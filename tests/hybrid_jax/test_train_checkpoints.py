"""Checkpoints: exact, on any mesh, kept by policy, with a way back from a broken one; and what a workdir refuses."""

import errno
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from hybrid_jax.config import CheckpointConfig, ConfigError, MeshConfig, RunConfig, to_dict
from hybrid_jax.loading import load
from hybrid_jax.sharding import make_mesh
from hybrid_jax.train import checkpoints as module
from hybrid_jax.train import workdir as workdirs
from hybrid_jax.train.checkpoints import Checkpoints, load_params
from hybrid_jax.train.optimizer import evaluation_params
from hybrid_jax.train.step import abstract_state, state_bytes
from hybrid_jax.train.workdir import RunError, check_room, check_text, claim, differences, finished, read_config, saved_steps
from tests.hybrid_jax.train_runs import small_run


def mesh_of(**sizes):
    config = MeshConfig(**{"fsdp": 1, **sizes})
    return make_mesh(config, jax.devices()[: config.data * config.fsdp * config.seq * config.tensor])


def random_state(shapes, seed, step):
    """A state laid out as ``shapes``, every array drawn from ``seed``."""
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(shapes))))

    def draw(x):
        values = jax.random.normal(next(keys), x.shape) if x.dtype == jnp.float32 else jnp.full(x.shape, step, x.dtype)
        return jax.device_put(values, x.sharding)

    return jax.tree.map(draw, shapes)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def break_checkpoint(workdir: Path, step: int):
    """Cut every array file of a checkpoint in half, as a copy or a disk that ran out would."""
    for file in (workdir / "checkpoints" / str(step)).rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.0)


@pytest.fixture(scope="module")
def shapes():
    return abstract_state(small_run(), mesh_of()).state


@pytest.fixture(scope="module")
def three_steps(shapes, tmp_path_factory):
    """A workdir with checkpoints of steps 1, 2 and 3; copy it before changing it."""
    workdir = tmp_path_factory.mktemp("run")
    claim(workdir, small_run())
    with Checkpoints(workdir, CheckpointConfig(keep=3)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(random_state(shapes, step, step))
    return workdir


@pytest.fixture
def workdir(three_steps, tmp_path):
    shutil.copytree(three_steps, tmp_path / "run")
    return tmp_path / "run"


def test_the_newest_is_restored_exactly(workdir, shapes):
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        state, told = checkpoints.restore(shapes)
    assert not told
    assert_same(state, random_state(shapes, 3, 3))


@pytest.mark.parametrize("sizes", [dict(fsdp=4, tensor=2), dict(data=2, tensor=4)])
def test_it_is_restored_on_another_mesh(workdir, shapes, sizes):
    other = abstract_state(small_run(), mesh_of(**sizes)).state
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        state, _ = checkpoints.restore(other)
    assert_same(state, random_state(shapes, 3, 3))
    assert all(x.sharding == s.sharding for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True))


def test_no_more_are_kept_than_asked_for_and_a_kill_leaves_nothing_behind(workdir, shapes):
    half_written = workdir / "checkpoints" / "4.orbax-checkpoint-tmp"
    half_written.mkdir()
    with Checkpoints(workdir, CheckpointConfig(keep=2)) as checkpoints:
        assert checkpoints.steps == [1, 2, 3]
        checkpoints.save(random_state(shapes, 4, 4))
        checkpoints.wait()
        assert checkpoints.steps == [3, 4]
    assert saved_steps(workdir) == [3, 4] and not half_written.exists()


def test_it_is_read_by_the_settings_given_and_without_a_word(workdir, shapes, caplog):
    settings = ocp.Context()
    settings.memory.read_concurrent_bytes = 2**20
    with Checkpoints(workdir, reading=settings) as checkpoints:
        assert checkpoints.load(None, {"params": shapes.params})[0] == 3
        assert checkpoints._reading.memory.read_concurrent_bytes == 2**20
    assert settings.multiprocessing.active_processes is None
    assert not caplog.records, caplog.records


def test_every_so_many_steps_one_is_kept_for_good(workdir, shapes):
    with Checkpoints(workdir, CheckpointConfig(every=1, keep=1, keep_every=2)) as checkpoints:
        for step in (4, 5, 6, 7):
            checkpoints.save(random_state(shapes, step, step))
        checkpoints.wait()
        assert checkpoints.steps == [2, 4, 6, 7]
        assert_same(checkpoints.restore(shapes)[0], random_state(shapes, 7, 7))
    assert saved_steps(workdir) == [2, 4, 6, 7]


def test_one_step_is_kept_for_good(workdir, shapes):
    with Checkpoints(workdir, CheckpointConfig(keep=1), for_good=2) as checkpoints:
        checkpoints.save(random_state(shapes, 4, 4))
        checkpoints.wait()
    assert saved_steps(workdir) == [2, 4]


def test_an_empty_folder_has_nothing_to_restore(tmp_path, shapes):
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert checkpoints.restore(shapes) == (None, [])


def test_a_truncated_newest_is_put_aside_and_the_one_before_taken(workdir, shapes):
    break_checkpoint(workdir, 3)
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        state, told = checkpoints.restore(shapes)
        assert_same(state, random_state(shapes, 2, 2))
        assert len(told) == 1 and "\n" not in told[0] and len(told[0]) < 500
        assert "step 3 cannot be read" in told[0] and "from step 2" in told[0]
        assert (workdir / "unreadable-3").is_dir() and checkpoints.steps == [1, 2]
        checkpoints.save(random_state(shapes, 5, 3))  # the same step again
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        assert_same(checkpoints.restore(shapes)[0], random_state(shapes, 5, 3))
    break_checkpoint(workdir, 3)  # and again
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        assert_same(checkpoints.restore(shapes)[0], random_state(shapes, 2, 2))
    assert (workdir / "unreadable-3").is_dir() and (workdir / "unreadable-3-2").is_dir()


def test_storage_that_fails_for_a_moment_loses_nothing(workdir, shapes, monkeypatch):
    load, failures = module.ocp.load_checkpointables, [ConnectionError("503 Service Unavailable"), TimeoutError()]

    def flaky(*given):
        if failures:
            raise failures.pop()
        return load(*given)

    monkeypatch.setattr(module.ocp, "load_checkpointables", flaky)
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        state, told = checkpoints.restore(shapes)
    assert not told and not failures and saved_steps(workdir) == [1, 2, 3]
    assert_same(state, random_state(shapes, 3, 3))


def test_a_model_that_does_not_fit_says_nothing_of_its_checkpoint(workdir, shapes, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 211434595920 bytes.")

    monkeypatch.setattr(module.ocp, "load_checkpointables", full)
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints, pytest.raises(jax.errors.JaxRuntimeError):
        checkpoints.restore(shapes)
    assert saved_steps(workdir) == [1, 2, 3]


def test_where_none_can_be_read_nothing_is_moved_and_nothing_started_over(workdir, shapes):
    for step in (1, 2, 3):
        break_checkpoint(workdir, step)
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        with pytest.raises(RunError, match="no checkpoint in .* can be read.*another --workdir"):
            checkpoints.restore(shapes)
    assert saved_steps(workdir) == [1, 2, 3]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: Failed to write")])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(workdir, shapes, monkeypatch, error):
    def full(*_, **__):
        raise RuntimeError("save failed") from error

    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        with monkeypatch.context() as patch, pytest.raises(RunError) as raised:
            patch.setattr(type(checkpoints._orbax), "save_checkpointables_async", full)
            checkpoints.save(random_state(shapes, 4, 4))
        assert "no space left" in str(raised.value) and "checkpoint of step 3 is whole" in str(raised.value)
        assert_same(checkpoints.restore(shapes)[0], random_state(shapes, 3, 3))


def test_another_failure_to_write_is_told_with_its_cause(workdir, shapes, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        monkeypatch.setattr(type(checkpoints._orbax), "wait", refused)
        with pytest.raises(RunError, match="could not be written.*Permission denied.*step 3 is whole"):
            checkpoints.wait()


# ---------------------------------------------------------------- reading a run


def test_load_gives_the_model_of_the_step_asked_for(workdir, shapes):
    tokens = jnp.arange(12).reshape(1, 12)
    newest, second = load(workdir), load(workdir, step=2)
    assert newest.config == small_run().model
    assert newest(tokens).shape == (1, 12, 32)
    assert jnp.array_equal(second.output_kernel(), random_state(shapes, 2, 2).params["output"]["kernel"].get_value())
    assert not jnp.array_equal(newest(tokens), second(tokens))
    assert saved_steps(workdir) == [1, 2, 3]


def test_load_warns_of_a_broken_newest_and_leaves_it_where_it_is(workdir, shapes):
    break_checkpoint(workdir, 3)
    with pytest.warns(UserWarning, match="step 3 .* cannot be read"):
        step, params = load_params(workdir, small_run(), mesh_of())
    assert step == 2
    assert_same(params, random_state(shapes, 2, 2).params)
    assert saved_steps(workdir) == [1, 2, 3]
    with pytest.warns(UserWarning), pytest.raises(ConfigError, match="can be read"):
        load(workdir, step=3)


def test_schedule_free_loads_its_average(tmp_path):
    run = small_run(optimizer={"name": "schedule_free"})
    claim(tmp_path, run)
    state = random_state(abstract_state(run, mesh_of()).state, 7, 1)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(state)
    _, params = load_params(tmp_path, run, mesh_of())
    assert_same(params, evaluation_params(run.optimizer, state.params, state.opt_state))


def test_given_parameters_are_evaluated_as_they_are_whatever_optimizer_is_to_train_them(tmp_path):
    run = small_run(optimizer={"name": "schedule_free"})
    claim(tmp_path, run)
    params = random_state(abstract_state(run, mesh_of()).state, 7, 1).params
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save_params(params)
    step, loaded = load_params(tmp_path, run, mesh_of())
    assert step == 0
    assert_same(loaded, params)


@pytest.mark.parametrize(("step", "expected"), [(9, "has no checkpoint of step 9; it has 1, 2, 3"), (None, "holds no checkpoint yet")])
def test_a_checkpoint_that_is_not_there(workdir, step, expected):
    if step is None:
        shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(ConfigError, match=expected):
        load(workdir, step)


def test_load_of_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model": {')
    with pytest.raises(ConfigError, match="is not JSON"):
        load(tmp_path)


# ---------------------------------------------------------------- whose folder it is


def test_a_run_is_read_back_as_it_was(workdir):
    assert read_config(workdir) == small_run()
    assert differences(small_run(), small_run(train={"batch": 16}, optimizer={"name": "muon"})) == [
        ("optimizer.name", "adamw", "muon"),
        ("train.batch", 8, 16),
    ]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"train": {"batch": 16}}, "train.batch: 8 -> 16"),
        ({"train": {"steps": 40}}, "train.steps: 20 -> 40"),
        ({"model": {"mixer": {"name": "gla", "heads": 2}}}, "model.mixer.name: 'attention' -> 'gla'"),
        ({"data": {"window": 16}}, "data.window: 12 -> 16"),
    ],
)
def test_a_workdir_of_another_run_is_refused_with_the_difference(workdir, changes, shown):
    before = (workdir / "config.json").read_text()
    with pytest.raises(ConfigError) as raised:
        claim(workdir, small_run(**changes))
    assert shown in str(raised.value) and "another --workdir" in str(raised.value)
    assert (workdir / "config.json").read_text() == before


def test_what_only_says_how_a_run_is_watched_and_placed_may_change(workdir):
    changed = small_run(
        train={"log_every": 3, "microbatch": 2, "bad_steps": 5},
        evaluation={"every": 5},
        checkpoint={"keep": 9},
        mesh={"fsdp": 2},
        log={"tensorboard": False},
    )
    claim(workdir, changed)
    assert read_config(workdir) == changed


def test_nothing_that_is_computed_may_change():
    """Between two starts of one run, whatever may be added to a configuration: groups that watch and place it, and these fields."""
    groups = ("evaluation.", "checkpoint.", "mesh.", "log.")
    free = {path for path in workdirs._flat(to_dict(RunConfig())) if workdirs.is_free(path) and not path.startswith(groups)}
    assert free == {"train.microbatch", "train.log_every", "train.bad_steps", "model.remat", "platform"}


def test_what_was_given_at_the_start_is_settled_by_the_first_step(workdir):
    """Data and optimiser may be chosen for given parameters, which are step 0; not for those that were trained from them."""
    (workdir / "checkpoints" / "1").rename(workdir / "checkpoints" / "0")
    changed = small_run(data={"window": 16}, optimizer={"beta2": 0.99})
    with pytest.raises(ConfigError, match="data.window: 12 -> 16; optimizer.beta2: 0.95 -> 0.99"):
        claim(workdir, changed)
    for step in ("2", "3"):
        shutil.rmtree(workdir / "checkpoints" / step)
    claim(workdir, changed)
    assert read_config(workdir) == changed


@pytest.mark.parametrize(
    ("optimizer", "steps", "allowed"),
    [
        ({"name": "schedule_free"}, 40, True),
        ({"name": "schedule_free"}, 2, False),  # fewer than it has taken
        ({"schedule": "wsd", "decay_steps": 17}, 40, True),  # of 20 steps three stood before the fall, and three are taken
        ({"schedule": "wsd", "decay_steps": 17}, 21, True),
        ({"schedule": "wsd", "decay_steps": 4, "warmup_steps": 0}, 6, False),  # of which the third would be in the fall
        ({"schedule": "linear"}, 40, False),
    ],
)
def test_more_steps_are_the_same_run_where_the_learning_rate_so_far_is(workdir, optimizer, steps, allowed):
    (workdir / "config.json").write_text(json.dumps(to_dict(small_run(optimizer=optimizer))))
    changed = small_run(optimizer=optimizer, train={"steps": steps})
    if allowed:
        claim(workdir, changed)
    else:
        with pytest.raises(ConfigError, match=f"train.steps: 20 -> {steps}"):
            claim(workdir, changed)
    assert read_config(workdir).train.steps == (steps if allowed else 20)


def test_a_run_is_finished_by_the_summary_of_its_last_step_alone(workdir):
    assert not finished(workdir, 3)
    for step in (2, 3):  # first that of before it was given more steps
        (workdir / "summary.json").write_text(json.dumps({"step": step}))
        assert finished(workdir, 3) == (step == 3)
    assert not finished(workdir, 4)


def test_a_workdir_without_a_checkpoint_holds_nothing_yet(tmp_path):
    claim(tmp_path / "new", small_run())
    claim(tmp_path / "new", small_run(train={"batch": 16}))
    assert read_config(tmp_path / "new").train.batch == 16


# Another process that trains in the folder it is given, until its standard input ends.
OTHER = """
import sys
from etils import epath
from hybrid_jax.train import workdir
workdir._hold(epath.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_workdir_in_which_another_process_trains(tmp_path):
    with subprocess.Popen([sys.executable, "-c", OTHER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"another process \({other.pid} on .*\) trains in {tmp_path}: give another --workdir"):
            claim(tmp_path, small_run())
        assert not (tmp_path / "config.json").exists()
        other.kill()
    claim(tmp_path, small_run())  # the lock ends with the process that held it, however that ended
    claim(tmp_path, small_run())  # and is no obstacle to that process itself
    assert read_config(tmp_path) == small_run()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(workdirs.fcntl, "lockf", refuse)
    claim(tmp_path, small_run())
    assert read_config(tmp_path) == small_run()


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to .*another --workdir"):
        claim(tmp_path / "file" / "run", small_run())


def test_checkpoints_without_a_config_are_nobodys(workdir):
    (workdir / "config.json").unlink()
    with pytest.raises(ConfigError, match="no config.json"):
        claim(workdir, small_run())


def test_a_run_goes_on_on_the_text_it_was_begun_with_alone(workdir, tmp_path):
    check_text(workdir, "STORE (train)", "one")
    check_text(workdir, "STORE (train)", "one")
    with pytest.raises(ConfigError, match=r"trained on other text than STORE \(train\) holds now.*another --workdir"):
        check_text(workdir, "STORE (train)", "two")
    (tmp_path / "new").mkdir()
    for fingerprint in ("one", "two"):  # no step is taken yet
        check_text(tmp_path / "new", "STORE (train)", fingerprint)
    assert (tmp_path / "new" / "text.sha256").read_text() == "two\n"


def test_text_may_be_moved(workdir, tmp_path):
    """What the run is trained on is known by its tokens, wherever they lie."""
    moved = small_run(data={"source": str(tmp_path / "store")})
    with pytest.raises(ConfigError, match="data.source"):  # a run of before they were noted
        claim(workdir, moved)
    (workdir / "text.sha256").write_text("abc\n")
    with pytest.raises(ConfigError, match="trained on other text than the store holds now"):
        claim(workdir, moved, SimpleNamespace(name="the store", fingerprint="abd"))
    assert read_config(workdir) == small_run()
    claim(workdir, moved, SimpleNamespace(name="the store", fingerprint="abc"))
    assert read_config(workdir) == moved
    with pytest.raises(ConfigError, match="data.source: .* -> 'a=1,b=2'"):
        claim(workdir, small_run(data={"source": "a=1,b=2"}))


def test_a_disk_too_small_for_the_run_is_refused_before_it_starts(workdir, shapes, monkeypatch):
    usage = namedtuple("usage", "total used free")
    size = state_bytes(shapes)
    few, often = {"keep": 3}, {"keep": 3, "keep_every": 2000}  # beside the newest three those of steps 2, 4 and 6 thousand
    falling = {"schedule": "wsd", "decay_steps": 4000}  # beside them that of step 5000
    evenly = {"schedule": "wsd", "decay_steps": 3000}  # which is one of those anyway
    cases = [(few, {}, 4, 0), (few, {}, 1, 3), (often, {}, 7, 0), (few, falling, 5, 0), (often, falling, 8, 0), (often, evenly, 7, 0)]
    cases = [(*case, need * size - less, saved, not less) for *case, need, saved in cases for less in (0, 1)]
    for checkpoint, optimizer, free, saved, fits in cases:
        config = small_run(checkpoint=checkpoint, optimizer=optimizer, train={"steps": 9000})
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(10**12, 0, free))
        folder = workdir if saved else workdir.parent
        if fits:
            check_room(folder, config, size)
        else:
            with pytest.raises(ConfigError, match="make room.*--config.checkpoint.keep"):
                check_room(folder, config, size)


def test_the_config_of_an_older_version_takes_todays_defaults(tmp_path):
    claim(tmp_path, small_run())
    values = json.loads((tmp_path / "config.json").read_text())
    del values["evaluation"], values["train"]["bad_steps"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path) == small_run() == RunConfig(**vars(small_run()))
    assert module.reason(ValueError("a\nb " * 200)).endswith("...")
