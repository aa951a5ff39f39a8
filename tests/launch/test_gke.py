"""GKE, with a stand-in for xpk."""

import json
import subprocess

import pytest

from tests.launch.stand_ins import ROOT, World

TRAIN = ["--", "python", "-m", "experiments.train", "--config=configs/gla_r6.py:tiny", "--workdir=gs://bucket/gla"]
SPECIAL = '--config.data.source=gs://bucket/it\'s "a" $HOME; `x` \\ store'
WHERE = ["--name=gla", "--cluster=pods", "--zone=us-west4-a", "--project=p"]
RUN = ["run", *WHERE, "--accelerator=v5litepod-256"]


@pytest.fixture
def world(tmp_path):
    return lambda **scenario: World(tmp_path / "world", **scenario)


def test_run(world):
    world = world()
    result = world.run("launch.gke", *RUN, "--slices=2", *TRAIN, SPECIAL)
    assert result.returncode == 0, result.stderr
    (call,) = world.calls("xpk")
    assert call[1:3] == ["workload", "create"]
    wanted = {"--workload=gla", "--cluster=pods", "--project=p", "--zone=us-west4-a", "--tpu-type=v5litepod-256", "--num-slices=2"}
    assert wanted < set(call) and "--max-restarts=50" in call and "--base-docker-image=python:3.12" in call
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    image = world.folder / "image"
    copied = sorted(str(path.relative_to(image)) for path in image.rglob("*") if path.is_file())
    assert copied == sorted([name for name in tracked if (ROOT / name).is_file()] + ["job.sh"])
    for verb in ("status", "logs", "delete"):
        assert f"python -m launch.gke {verb} --name=gla --cluster=pods --project=p --zone=us-west4-a" in result.stdout


@pytest.mark.parametrize(
    "acts, code",
    [
        ("sys.exit(0)", 0),  # done
        ("sys.exit(1)", 1),  # failed: not started again
        ("os.kill(os.getppid(), signal.SIGTERM); time.sleep(5); sys.exit(7)", 143),  # its machine goes: saves, and is started again
    ],
)
def test_in_the_container(world, tmp_path, acts, code):
    world = world()
    assert world.run("launch.gke", *RUN, *TRAIN, SPECIAL).returncode == 0
    image = world.folder / "image"
    stop = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))"
    record = f"json.dump(sys.argv[1:], open({str(tmp_path / 'given')!r}, 'w'))"
    world.write(world.folder / "host_bin" / "python", f"import time\n{stop}\n{record}\n{acts}\n")
    world.write(world.folder / "host_bin" / "pip", "assert sys.argv[-1] == '.[tpu,gcs]' and Path('setup.cfg').is_file()")
    command = next(word for word in world.calls("xpk")[0] if word.startswith("--command=")).removeprefix("--command=")
    # as xpk has it in its container
    wrapped = f"_sigterm() (kill -SIGTERM $! 2>/dev/null;);\ntrap _sigterm SIGTERM;\n({command}) & PID=$!;\nwait $PID; exit $?"
    environment = {"PATH": f"{world.folder / 'host_bin'}:/usr/bin:/bin", "WORLD": str(world.folder)}
    assert subprocess.run(["bash", "-c", wrapped], cwd=image, env=environment, timeout=30).returncode == code
    assert json.loads((tmp_path / "given").read_text()) == [*TRAIN[2:], SPECIAL]


def test_dry_run_and_the_other_commands(world):
    world = world()
    result = world.run("launch.gke", *RUN, "--dry_run", *TRAIN)
    assert result.returncode == 0 and "xpk workload create --workload=gla" in result.stdout and "64 hosts" in result.stdout
    for verb, first in [("status", "xpk workload list"), ("logs", "xpk workload list"), ("delete", "xpk workload delete")]:
        assert world.run("launch.gke", verb, *WHERE, "--dry_run").stdout.startswith(first)
    assert world.calls() == []
    for verb in ("status", "logs", "delete"):
        assert world.run("launch.gke", verb, *WHERE).returncode == 0
    assert [call[:3] for call in world.calls("xpk")] == [["xpk", "workload", "list"]] * 2 + [["xpk", "workload", "delete"]]
    assert any("xpk.google.com/workload=gla" in word for word in world.calls("kubectl")[0])


REFUSED = [
    (["up", *WHERE], TRAIN, "say what to do first"),
    (["run", *WHERE[1:], "--accelerator=v4-8"], TRAIN, "give --name"),
    (["run", *WHERE[:1], *WHERE[2:], "--accelerator=v4-8"], TRAIN, "give --cluster"),
    (["run", *WHERE], TRAIN, "give --accelerator"),
    (["run", *WHERE, "--accelerator=tpu7x-100"], TRAIN, "sizes of tpu7x are"),
    (["run", *WHERE[:2], "--zone=us-west4", "--project=p", "--accelerator=v4-8"], TRAIN, "did you mean us-west4-a?"),
    (RUN, TRAIN[:-1], "give --workdir=gs://BUCKET/FOLDER"),
    (RUN, [*TRAIN, "--config.train.stesp=3"], "did you mean 'steps'?"),
]


@pytest.mark.parametrize("own, command, said", REFUSED, ids=range(len(REFUSED)))
def test_refused_before_anything_is_created(world, own, command, said):
    world = world()
    result = world.run("launch.gke", *own, *command)
    assert result.returncode == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1
    assert world.calls() == []


def test_xpk_is_missing_or_fails(world):
    world = world(xpk_error="Unable to find cluster pods")
    result = world.run("launch.gke", *RUN, *TRAIN)
    assert result.returncode == 1 and "Unable to find cluster pods" in result.stderr and "launch.gke status" in result.stderr
    world.remove("xpk")
    result = world.run("launch.gke", *RUN, *TRAIN)
    assert result.returncode == 2 and "xpk is not on PATH: pip install xpk" in result.stderr
    shown = world.run("launch.gke", *RUN, "--dry_run", *TRAIN)  # runs nothing, and so needs nothing
    assert shown.returncode == 0 and "xpk workload create --workload=gla" in shown.stdout
