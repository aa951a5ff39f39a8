"""A job's life on TPU VMs, with a stand-in for gcloud that has hosts, states and failures."""

import json
import os
import pty
import signal
import subprocess
import tarfile
import time
from types import SimpleNamespace

import pytest

from launch import supervise
from tests.launch.stand_ins import ROOT, World

TRAIN = ["--", "python", "-m", "experiments.train", "--config=configs/gla_r6.py:tiny"]
AWKWARD = [
    "--config.model.ratio=None",
    "--config.model.attention_layers=[1, 4]",
    '--config.data.source=gs://bucket/it\'s "a" $HOME; `x` \\ store',
]
WORKDIR = "--workdir=gs://bucket/gla"
WHERE = ["--name=gla", "--zone=us-central2-b"]
RUN = ["run", *WHERE, "--accelerator=v4-16"]


@pytest.fixture
def world(tmp_path):
    return lambda **scenario: World(tmp_path / "world", **scenario)


def run(world, *arguments, **keywords):
    return world.run("launch.tpu_vm", *arguments, **keywords)


def test_the_whole_life_of_a_job(world):
    world = world(failures={"scp": 1})
    result = run(world, *RUN, "--spot", "--project=p", *TRAIN, *AWKWARD, WORKDIR)
    assert result.returncode == 0, result.stderr
    assert world.verbs() == ["create", "scp", "scp", "ssh", "ssh", "ssh", "ssh", "delete"]  # set up, started, followed, asked
    create = next(call for call in world.calls() if "create" in call)
    assert create[1:6] == ["compute", "tpus", "queued-resources", "create", "gla"]
    wanted = {
        "--zone=us-central2-b",
        "--project=p",
        "--accelerator-type=v4-16",
        "--runtime-version=tpu-ubuntu2204-base",
        "--node-id=gla",
        "--spot",
    }
    assert set(create[6:]) == wanted
    for host in range(2):  # what was typed here is what the trainer was given there, character for character
        assert [arguments for _, *arguments in world.starts(host)] == [["-m", "experiments.train", TRAIN[-1], *AWKWARD, WORKDIR]]
        assert world.starts(host)[0][0].endswith(f"host{host}/launch/gla/code")
    for line in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "host 0: step 1", "host 0: done", "the machines are deleted"):
        assert line in result.stdout
    assert "host 1" not in result.stdout
    assert world.state()["tpu"] is None


def test_only_what_git_tracks_is_copied(world, tmp_path):
    from launch import code

    code.pack(ROOT, tmp_path / "code.tar.gz", {"job.sh": "true"})
    with tarfile.open(tmp_path / "code.tar.gz") as archive:
        names = archive.getnames()
        assert archive.getmember("job.sh").mode & 0o100
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert sorted(names) == sorted([f"code/{name}" for name in tracked if (ROOT / name).is_file()] + ["job.sh"])
    assert not any(".git/" in name for name in names)


def test_a_preempted_job_goes_on_on_new_machines(world):
    world = world(acts=["preempted", "preempted", "done"])
    result = run(world, *RUN, "--spot", *TRAIN, WORKDIR)
    assert result.returncode == 0, result.stderr
    assert [verb for verb in world.verbs() if verb in ("create", "delete")] == ["create", "delete"] * 3
    assert len(world.starts(0)) == 3 and len({json.dumps(start) for start in world.starts(0)}) == 1
    assert result.stdout.count("goes on from its last checkpoint on new machines") == 2
    assert world.state()["tpu"] is None


def test_several_slices(world):
    world = world(hosts=4)
    result = run(world, *RUN, "--slices=2", *TRAIN, WORKDIR)
    assert result.returncode == 0, result.stderr
    create = next(call for call in world.calls() if "create" in call)
    assert {"--node-count=2", "--node-prefix=gla"} < set(create) and "--node-id=gla" not in create
    assert all(len(world.starts(host)) == 1 for host in range(4))


def test_preempted_before_it_was_active(world):
    world = world(states=[["WAITING_FOR_RESOURCES", "SUSPENDED"], ["WAITING_FOR_RESOURCES", "ACTIVE"]])
    assert run(world, *RUN, "--spot", *TRAIN, WORKDIR).returncode == 0
    assert [verb for verb in world.verbs() if verb in ("create", "delete")] == ["create", "delete"] * 2


def test_a_job_that_was_asked_to_stop_is_started_again_where_its_machines_are_there(world):
    world = world(acts=["stopped", "done"])
    result = run(world, *RUN, *TRAIN, WORKDIR)
    assert result.returncode == 0, result.stderr
    assert len(world.starts(0)) == len(world.starts(1)) == 2
    assert world.verbs().count("create") == 1 and world.verbs().count("scp") == 1


def test_a_failed_job_shows_why_and_deletes_its_machines(world):
    world = world(acts=["failed"])
    result = run(world, *RUN, *TRAIN, WORKDIR)
    assert result.returncode == 1
    assert "host 1: ValueError: out of luck" in result.stdout
    assert result.stderr.strip().splitlines()[-1].startswith("error: the job failed")
    assert world.state()["tpu"] is None and "may still be there" not in result.stderr


def test_machines_that_someone_else_deleted_are_not_made_again(world):
    world = world(acts=["deleted"])
    result = run(world, *RUN, *TRAIN, WORKDIR)
    assert result.returncode == 1 and "error: gla was deleted from elsewhere" in result.stderr and "may still be" not in result.stderr
    assert world.verbs().count("create") == 1


def test_google_cloud_does_not_answer_any_more(world):
    world = world(acts=["unreachable"])
    result = run(world, *RUN, *TRAIN, WORKDIR)
    assert result.returncode == 1 and "error: Google Cloud does not say how gla is" in result.stderr and "UNAVAILABLE" in result.stderr
    assert "is paid for until it is deleted" in result.stderr and "delete it:  python -m launch.tpu_vm delete" in result.stderr


def test_an_environment_that_cannot_be_installed(world):
    world = world(pip_code=1)
    result = run(world, *RUN, *TRAIN, WORKDIR)
    assert result.returncode == 1 and "could not be installed" in result.stderr and "the machines are deleted" in result.stderr
    assert world.state()["tpu"] is None and not world.starts(0)


@pytest.mark.parametrize(
    "error, hint",
    [
        ("RESOURCE_EXHAUSTED: Quota limit 'TPUV4sPerProjectPerZone' has been exceeded. Limit: 8.", "docs/quota"),
        ("PERMISSION_DENIED: Permission 'tpu.queuedResources.create' denied", "roles/tpu.admin"),
    ],
)
def test_refused_by_google_cloud(world, error, hint):
    world = world(create_error=error)
    result = run(world, *RUN, *TRAIN, WORKDIR)
    assert result.returncode == 1 and error in result.stderr and hint in result.stderr and "nothing is left of it" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and world.state()["tpu"] is None


def test_a_request_that_fails_in_the_queue(world):
    world = world(states=[["WAITING_FOR_RESOURCES", "FAILED"]], why_failed="no quota for TPU v4")
    result = run(world, *RUN, *TRAIN, WORKDIR)
    assert result.returncode == 1 and "cannot be had: no quota for TPU v4; the request is deleted" in result.stderr
    assert world.state()["tpu"] is None


def test_what_fails_for_a_moment_ends_no_job(world):
    """Its machines are set up, deleted and asked for again as often as it takes; what was refused at first would be a mistake."""
    states = [["ACTIVE"], ["WAITING_FOR_RESOURCES", "FAILED"], ["ACTIVE"]]
    world = world(acts=["preempted", "done"], states=states, failures={"install": 1, "create": 2, "delete": 1}, why_failed="none left")
    result = run(world, *RUN, "--spot", *TRAIN, WORKDIR)
    assert result.returncode == 0, result.stderr
    assert "gla cannot be had: none left; asking again in a while" in result.stdout and world.state()["tpu"] is None
    assert world.verbs().count("create") == 5 and world.verbs().count("delete") == 4


def test_machines_that_cannot_be_deleted_are_not_left_without_a_word(world):
    world = world(failures={"delete": 9})
    result = run(world, *RUN, *TRAIN, WORKDIR)
    assert result.returncode == 1 and "COULD NOT BE DELETED" in result.stderr
    assert "python -m launch.tpu_vm delete --name=gla --zone=us-central2-b" in result.stderr


# ---------------------------------------------------------------- what the hosts say, where they do not say the same


@pytest.fixture
def plan(monkeypatch):
    """Of a job on two hosts whose logs have three lines each time; ``asked``: from which line on, each time."""
    asked = []
    monkeypatch.setattr(supervise.hosts, "logs", lambda tpu, first: asked.append(first))
    monkeypatch.setattr(supervise.shell, "stream", lambda command, line: [line(f"line {n}") for n in range(3)])
    monkeypatch.setattr(supervise.time, "sleep", lambda seconds: None)
    plan = supervise.Plan(SimpleNamespace(name="gla"), [], "the command", None, hosts=2)
    return SimpleNamespace(plan=plan, asked=asked)


@pytest.mark.parametrize(
    ("told", "taken_away", "ended"),
    [
        ([["0", "running"], ["running", "0"], ["0", "0"]], False, "done"),  # no sooner than both have ended
        ([["1", "134"]], True, "lost"),  # the one failed for the want of the other
        ([["1", "134"], ["1", "134"]], False, "failed"),
        ([["1", "2"]], False, "failed"),
        ([["0"], ["0"], ["0", "0"]], False, "done"),  # one did not answer
        ([[], [], ["0", "0"]], False, "done"),
        ([["0"]], True, "lost"),
    ],
)
def test_a_job_ends_as_its_hosts_say_together(plan, monkeypatch, capsys, told, taken_away, ended):
    monkeypatch.setattr(supervise, "host_states", lambda tpu: supervise.HostStates(told.pop(0), {"the command"}))
    monkeypatch.setattr(supervise, "_taken_away", lambda tpu: taken_away)
    assert supervise._follow(plan.plan) == ended and not told
    assert plan.asked == list(range(1, 3 * len(plan.asked), 3))  # no line of the log is shown twice
    assert capsys.readouterr().out.count("line 0") == len(plan.asked)


@pytest.mark.parametrize(
    ("states", "expected"),
    [(["running", "running"], True), (["running", "0"], True), (["running"], False), (["running", "killed"], False), ([], False)],
)
def test_a_job_is_under_way_where_every_host_says_so(plan, monkeypatch, states, expected):
    monkeypatch.setattr(supervise, "host_states", lambda tpu: supervise.HostStates(states, {"the command"} if states else set()))
    assert supervise._under_way(plan.plan) == expected


# ---------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize("place", ["describe", "follow"])
def test_ctrl_c_without_a_terminal_leaves_it_and_says_so(world, place):
    world = world(acts=["hanging"], ctrl_c=place, states=[["WAITING_FOR_RESOURCES"] * 2 + ["ACTIVE"]])
    result = run(world, *RUN, *TRAIN, WORKDIR)
    assert result.returncode == 130, result.stderr
    for verb in ("status", "logs", "delete"):
        assert f"python -m launch.tpu_vm {verb} --name=gla --zone=us-central2-b" in result.stdout
    assert "is paid for until it is deleted" in result.stdout
    assert world.state()["tpu"] is not None and "delete" not in world.verbs()
    assert run(world, "delete", *WHERE).returncode == 0 and world.state()["tpu"] is None


@pytest.mark.parametrize("answer, left", [(b"y\n", False), (b"n\n", True), (b"\n", True), (b"\x04", True)])
def test_ctrl_c_in_a_terminal_asks(world, answer, left):
    world = world(acts=["hanging"], ctrl_c="follow")
    ours, theirs = pty.openpty()
    os.write(ours, answer)
    result = run(world, *RUN, *TRAIN, WORKDIR, stdin=theirs)
    os.close(ours), os.close(theirs)
    assert result.returncode == 130 and "Delete gla now" in result.stdout
    assert (world.state()["tpu"] is not None) == left
    assert ("is paid for until it is deleted" in result.stdout) == left


def test_sigterm_says_what_is_left(world):
    world = world(states=[["WAITING_FOR_RESOURCES"]])
    process = subprocess.Popen(
        world.command("launch.tpu_vm", *RUN, *TRAIN, WORKDIR),
        **{"env": world.environment(), "cwd": ROOT, "stdout": subprocess.PIPE, "stdin": subprocess.DEVNULL, "text": True},
    )
    while "WAITING" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 130 and "delete it:" in output


def test_the_same_command_goes_on_with_machines_that_are_there(world):
    world = world(acts=["hanging"], ctrl_c="follow")
    assert run(world, *RUN, *TRAIN, WORKDIR).returncode == 130
    other = run(world, *RUN, *TRAIN, "--workdir=gs://bucket/other")
    assert other.returncode == 2 and "runs another command" in other.stderr and world.state()["tpu"] is not None
    status = run(world, "status", *WHERE)
    assert "gla: ACTIVE" in status.stdout and "2 hosts" in status.stdout
    again = run(world, *RUN, *TRAIN, WORKDIR)
    assert again.returncode == 0 and "is there already (ACTIVE)" in again.stdout and "host 0: done" in again.stdout
    assert len(world.starts(0)) == 1 and world.verbs().count("create") == 1 and world.state()["tpu"] is None


def test_logs_status_and_delete(world):
    world = world(acts=["hanging"], ctrl_c="follow")
    assert "there is none" in run(world, "status", *WHERE).stdout
    assert run(world, "logs", *WHERE).returncode == 1
    run(world, *RUN, *TRAIN, WORKDIR)
    assert "host 0: done" in run(world, "logs", *WHERE).stdout
    time.sleep(0.5)
    assert "2 hosts: ended with exit code 0" in run(world, "status", *WHERE).stdout
    assert run(world, "delete", *WHERE).returncode == 0
    assert "there is none" in run(world, "delete", *WHERE).stdout


# ---------------------------------------------------------------- what is printed, and what is refused


def test_dry_run_prints_every_command_and_runs_none(world):
    world = world()
    result = run(world, *RUN, "--reserved", "--slices=3", "--dry_run", *TRAIN, *AWKWARD, WORKDIR)
    assert result.returncode == 0 and world.calls() == []
    lines = [line for line in result.stdout.splitlines() if line.startswith("gcloud ")]
    verbs = [line.split()[4] if line.split()[1] == "compute" else line.split()[3] for line in lines]
    assert verbs == ["accelerator-types", "describe", "create", "describe", "scp", "ssh", "ssh", "ssh", "ssh", "delete"]
    assert "--node-count=3 --node-prefix=gla --reserved" in result.stdout and "3 x 8 chips (2x2x2) on 6 hosts" in result.stdout
    assert "'--config.model.attention_layers=[1, 4]'" in result.stdout
    for verb in ("status", "logs", "delete"):
        shown = run(world, verb, *WHERE, "--dry_run")
        assert shown.returncode == 0 and shown.stdout.startswith("gcloud compute tpus queued-resources") and world.calls() == []


REFUSED = [
    (["start", *WHERE], TRAIN, "say what to do first: run, status, logs, delete"),
    (["run", "--zone=us-central2-b", "--accelerator=v4-16"], TRAIN, "give --name"),
    (["run", "--name=gla", "--accelerator=v4-16"], TRAIN, "give --zone"),
    (["run", *WHERE], TRAIN, "give --accelerator"),
    (["run", "--name=My_Job", "--zone=us-central2-b", "--accelerator=v4-16"], TRAIN, "--name=My_Job: small letters"),
    (["run", "--name=gla", "--zone=us-central2", "--accelerator=v4-16"], TRAIN, "is not a zone; did you mean us-central2-b?"),
    (["run", *WHERE, "--accelerator=v5e-256"], TRAIN, "did you mean v5litepod-256?"),
    (["run", *WHERE, "--accelerator=v5litepod-100"], TRAIN, "sizes of v5litepod are (in chips): 1, 4, 8, 16, 32, 64, 128, 256"),
    (["run", *WHERE, "--accelerator=v4-17"], TRAIN, "TensorCores, two a chip"),
    (["run", *WHERE, "--accelerator=tpu7x-128"], TRAIN, "only on GKE"),
    ([*RUN, "--spot", "--reserved"], TRAIN, "exclude each other"),
    ([*RUN, "--slices=0"], TRAIN, "slices"),
    ([*RUN, "--spto"], TRAIN, "spto"),
    ([*RUN, WORKDIR], TRAIN, "belong to the command, after --"),
    ([*RUN, "--config=configs/gla_r6.py"], TRAIN, "belong to the command, after --"),
    (RUN, [], "give the command to start after --"),
    (RUN, ["--", "bash", "-c", "true"], "give the command to start after --"),
    (RUN, ["--", "python", "-m", "experiments.trian", WORKDIR], "did you mean experiments.train?"),
    (RUN, [*TRAIN], "give --workdir=gs://BUCKET/FOLDER"),
    (RUN, [*TRAIN, "--workdir=runs/gla"], "would write to runs/gla on machines that are deleted"),
    (RUN, ["--", "python", "-m", "experiments.eval", "--workdir=runs/gla"], "would write to runs/gla on machines that are deleted"),
    (RUN, ["--", "python", "-m", "experiments.sweep", "--size=340m"], "what experiments.sweep writes would be deleted with the machines"),
    (RUN, [*TRAIN, WORKDIR, "--config.train.stesp=3"], "did you mean 'steps'?"),
    (RUN, [*TRAIN, WORKDIR, "--config.train.steps=many"], "train.steps"),
    (RUN, [*TRAIN, "--workdri=gs://bucket/gla", WORKDIR], "did you mean --workdir?"),
    (RUN, [*TRAIN, WORKDIR, "steps"], "unexpected 'steps'"),
    (RUN, [*TRAIN, WORKDIR, "--step=3"], "experiments.train: this command has no flag --step"),
    (RUN, ["--", "python", "-m", "experiments.train", "--config=configs/gla_r7.py", WORKDIR], "no configuration file"),
    (["run", "--name=gla", "--zone=us-west4-b", "--accelerator=v4-16"], [*TRAIN, WORKDIR], "does not list the TPUs of us-west4-b"),
    (
        ["run", "--name=gla", "--zone=us-west4-a", "--accelerator=v5litepod-128"],
        [*TRAIN, WORKDIR],
        "does not offer v5litepod-128; did",
    ),
    (RUN, [*TRAIN, "--workdir=gs://elsewhere/gla"], "gcloud storage buckets create gs://elsewhere --location=us-central2"),
]


@pytest.mark.parametrize("own, command, said", REFUSED, ids=range(len(REFUSED)))
def test_refused_before_anything_is_created(world, own, command, said):
    world = world()
    result = run(world, *own, *command)
    assert result.returncode == 2, (result.stdout, result.stderr)
    assert said in result.stderr and len(result.stderr.splitlines()) == 1
    assert world.verbs() == []


def test_gcloud_or_git_is_missing(world):
    world = world()
    world.remove("gcloud")
    for arguments in ([*RUN, *TRAIN, WORKDIR], ["status", *WHERE]):
        result = run(world, *arguments)
        assert result.returncode == 2 and "gcloud is not on PATH: install it from https://" in result.stderr
    shown = run(world, *RUN, "--dry_run", *TRAIN, WORKDIR)  # runs nothing, and so needs nothing
    assert shown.returncode == 0 and "gcloud compute tpus queued-resources create gla" in shown.stdout
    world.remove("git")
    result = run(world, *RUN, *TRAIN, WORKDIR)
    assert result.returncode == 2 and "git is not on PATH" in result.stderr


def test_help_names_every_flag(world):
    shown = run(world(), "--help").stdout
    assert all(f"--{flag}" in shown for flag in ("name", "zone", "project", "accelerator", "slices", "dry_run")) and "Ctrl-C" in shown
