"""Running the commands inside a test: on one device, on a model that compiles in seconds."""

import io
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from absl import flags
from ml_collections import ConfigDict

from experiments import beginning, checkpoint, cli, convert, dtype, folder, generate, processes, report, suites, train
from experiments import eval as evaluation
from hybrid_jax import sharding
from hybrid_jax.config import to_dict
from hybrid_jax.train import checkpoints
from tests.hybrid_jax.train_runs import small_run

CONFIG = f"--config={Path(__file__)}"  # this file is the configuration


def get_config() -> ConfigDict:
    run = small_run(
        model={"vocabulary": 264, "ratio": None},
        data={"window": 32, "mqar": {"share": 0.25, "pairs": 2, "length": 16, "alphabet": 8, "examples": 16}},
        train={"steps": 8, "batch": 4, "microbatch": 2, "log_every": 1},
        evaluation={"every": 4, "tokens": 512, "batch": 4},
        checkpoint={"every": 4},
    )
    return ConfigDict(to_dict(run))


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(main, *arguments: str, devices: int | None = 1) -> Result:
    """Run a command's ``main`` as the command line would; ``devices``: as if there were so many (None: all eight)."""
    for module in (folder, checkpoint, beginning, dtype, suites, evaluation):  # what an earlier command was given
        for flag in flags.FLAGS.flags_by_module_dict()[module.__name__]:
            flag.unparse()
    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended, Captured() as captured:
        patch.setattr(checkpoints, "PAUSE", 0.0)
        patch.setattr(processes, "connect", lambda **_: None)  # JAX has been used
        patch.setattr(sharding, "make_mesh", lambda config, given=None: make_mesh(config, given or jax.devices()[:devices]))
        if main in (evaluation.main, convert.main, generate.main, report.main):
            cli.start_without_config(main, ["command", *arguments])
        else:
            cli.start(main, folder.WORKDIR, ["command", *arguments])
    return Result(ended.value.code, captured.out, captured.err)


def run_train(workdir, *arguments: str, devices: int | None = 1) -> Result:
    return run(train.main, CONFIG, f"--workdir={workdir}", *arguments, devices=devices)


def run_eval(workdir, *arguments: str, devices: int | None = 1) -> Result:
    return run(evaluation.main, f"--workdir={workdir}", *arguments, devices=devices)


class Captured:
    """Standard output and error of a block; pytest's own fixture cannot be used from module-wide ones."""

    def __enter__(self) -> "Captured":
        self._before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = self._streams = io.StringIO(), io.StringIO()
        return self

    def __exit__(self, *_) -> None:
        self.out, self.err = (stream.getvalue() for stream in self._streams)
        sys.stdout, sys.stderr = self._before
