"""Evaluate a training run: held-out loss, bits per byte, loss by position in the window, associative recall.

    python -m experiments.eval --workdir=runs/gla_r6-tiny                  # the newest checkpoint
    python -m experiments.eval --workdir=runs/gla_r6-tiny --step=100       # a named one
    python -m experiments.eval --workdir=runs/gla_r6-tiny --tokens=1000000 # on more of the held-out text

Prints a table, writes WORKDIR/eval-STEP.json and draws WORKDIR/summary.png anew, also while the run is under way.
Without --tokens the numbers are those that training wrote for that step.
"""

import dataclasses
from pathlib import Path

from absl import flags

from experiments import cli
from hybrid_jax.config import ConfigError
from hybrid_jax.train.workdir import read_config

TOKENS = flags.DEFINE_integer("tokens", None, "Held-out tokens to score, at most; default: the run's evaluation.tokens.", lower_bound=1)


def main() -> int:
    if cli.WORKDIR.value is None:
        raise ConfigError("give the --workdir of a training run, such as --workdir=runs/gla_r6-tiny")
    workdir = Path(cli.WORKDIR.value)
    config = read_config(workdir)
    if TOKENS.value:
        config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, tokens=TOKENS.value))

    import jax

    from hybrid_jax.data.sources import make_sources
    from hybrid_jax.evals.evaluate import make_evaluate, write_evaluation
    from hybrid_jax.hf.convert import carried_tokenizer
    from hybrid_jax.model import abstract
    from hybrid_jax.sharding import make_mesh
    from hybrid_jax.train import summary
    from hybrid_jax.train.checkpoints import load_params
    from hybrid_jax.train.plot import plot_run

    mesh = make_mesh(config.mesh)
    _, held_out = make_sources(config.data.source, carried_tokenizer(workdir))
    with jax.set_mesh(mesh):
        step, params = load_params(workdir, config, mesh, cli.STEP.value)
        results = make_evaluate(config, abstract(config.model)[0], mesh, held_out)(params)
    file = write_evaluation(workdir, step, results)
    summary.show_evaluation(f"{workdir.name}, step {step:,}", results)
    print(f"written to {file}, drawn in {plot_run(workdir)}")
    return 0


if __name__ == "__main__":
    cli.start_without_config(main)
