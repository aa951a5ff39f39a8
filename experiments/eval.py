"""Evaluate a training run: held-out loss, bits per byte, loss by position in the window, associative recall.

    python -m experiments.eval --workdir=runs/gla_r6-tiny                  # the newest checkpoint
    python -m experiments.eval --workdir=runs/gla_r6-tiny --step=100       # a named one
    python -m experiments.eval --workdir=runs/gla_r6-tiny --tokens=1000000 # on more of the held-out text

Prints a table, writes WORKDIR/eval-STEP.json and draws WORKDIR/summary.png anew, also while the run is under way. The numbers are
those that training wrote for that step. With --tokens they are of as many tokens, in a file of their own, eval-STEP-N-tokens.json; the
picture and `experiments.report` take the evaluation of the most tokens. With a --dtype that is not the run's own they are printed, and not
written: they are not that run's. Further suites, one at a time:

    python -m experiments.eval --workdir=RUN --suite=held_out --lengths=256,1024,4096        # loss out to longer windows, with a picture
    python -m experiments.eval --workdir=RUN --suite=mqar --pairs=4,8,16 --lengths=64,256    # recall of more pairs, from farther back
    python -m experiments.eval --workdir=RUN --suite=ruler --lengths=1024,4096 --texts=FOLDER
    python -m experiments.eval --workdir=RUN --suite=lm --tasks=arc_easy,hellaswag,lambada_openai --data=FOLDER
    python -m experiments.eval --workdir=RUN --suite=completion --files=based-fda.parquet,based-swde.parquet

They write WORKDIR/evals/SUITE-STEP.json, which `experiments.report` collects; docs/evaluation.md says what each measures, and
which files it takes.
"""

import dataclasses
import json
import os

from absl import flags
from etils import epath

from experiments import checkpoint, cli, folder, processes, suites
from experiments.dtype import DTYPE
from hybrid_jax.config import ConfigError, MeshConfig, RunConfig
from hybrid_jax.storage import run_folder, write_whole
from hybrid_jax.train.workdir import evaluation_file, keep_programs, read_config, write_evaluation

SUITE = flags.DEFINE_enum("suite", None, sorted(suites.SUITES), "What to measure in place of the run's own evaluation.")
TOKENS = flags.DEFINE_integer(
    "tokens",
    None,
    "Held-out tokens to score, at most, with --suite=held_out or no --suite; default: the run's evaluation.tokens.",
    lower_bound=1,
)

flags.FLAGS["workdir"].help = "The run to evaluate: its folder, or gs://BUCKET/FOLDER."


def main() -> int:
    if folder.WORKDIR.value is None:
        raise ConfigError("give the --workdir of a training run, such as --workdir=runs/gla_r6-tiny")
    workdir = run_folder(folder.WORKDIR.value)
    asked = suites.asked(SUITE.value, flags.FLAGS)
    config = read_config(workdir)
    dtype = DTYPE.value if DTYPE.value != config.model.dtype else None  # another than the run's own
    config = dataclasses.replace(config, model=config.model.computing_in(dtype))
    processes.connect()
    if os.access(workdir, os.W_OK):  # which a bucket is not asked for
        keep_programs(workdir)
    if SUITE.value is None:
        evaluate_as_training_does(workdir, config, written=dtype is None)
    else:
        evaluate_by_suite(workdir, config, SUITE.value, asked, {"dtype": dtype} if dtype else {})
    return 0


def evaluate_as_training_does(workdir: epath.Path, config: RunConfig, written: bool) -> None:
    if TOKENS.value:
        config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, tokens=TOKENS.value))

    import jax

    from hybrid_jax.data.sources import mixed_sources
    from hybrid_jax.evals.evaluate import make_evaluate
    from hybrid_jax.hf.convert import carried_tokenizer
    from hybrid_jax.model import abstract
    from hybrid_jax.train import summary
    from hybrid_jax.train.checkpoints import load_params
    from hybrid_jax.train.plot import plot_run

    graph, params = abstract(config.model)
    mesh = mesh_for(config.mesh, params)
    _, held_out = mixed_sources(config.data.sources, carried_tokenizer(workdir))
    with jax.set_mesh(mesh):
        step, params = load_params(workdir, config, mesh, checkpoint.STEP.value)
        results = make_evaluate(config, graph, mesh, held_out)(params)
    if jax.process_index():
        return
    file = evaluation_file(workdir, step, results["tokens"] if TOKENS.value else None)
    if written:
        write_evaluation(file, step, results)
    summary.show_evaluation(f"{workdir.name}, step {step:,}", results)
    if written:
        print(f"written to {file}, drawn in {plot_run(workdir)}")


def mesh_for(config: MeshConfig, params):
    """The run's own mesh where there are such devices; else ``params`` dealt over all there are, or whole on each if they do not divide."""
    from hybrid_jax.sharding import make_mesh, param_shardings

    for sizes in (config, MeshConfig()):
        try:
            mesh = make_mesh(sizes)
            param_shardings(mesh, params)
        except ConfigError:
            continue
        return mesh
    return make_mesh(MeshConfig(data=-1, fsdp=1))


def evaluate_by_suite(workdir: epath.Path, config: RunConfig, name: str, asked: list[str], settings: suites.Results) -> None:
    """``settings``: what the results are told to be of, beside what the suite says."""
    import jax

    from hybrid_jax.loading import load_run
    from hybrid_jax.train.summary import print_table

    suite = suites.SUITES[name]
    model, step = load_run(workdir, config, checkpoint.STEP.value)
    try:
        results = suite.evaluate(model, workdir, config)
    except ValueError as error:  # about an option or the model's tokenizer, and it says which
        raise ConfigError(str(error)) from None
    if jax.process_index():
        return
    results["settings"] |= settings
    file = workdir / "evals" / f"{name}-{step}.json"
    file.parent.mkdir(exist_ok=True)
    told = {"headline": suite.headline(results), "notes": suite.notes(results)}
    write_whole(file, json.dumps({"suite": name, "step": step, "flags": asked, **told, **results}, indent=2) + "\n")
    print_table(suite.table(f"{workdir.name}, step {step:,}: {name}", results))
    drawn = suite.draw(results, file.with_suffix(".png"), config) if suite.draw else None
    print(f"written to {file}" + (f", drawn in {drawn}" if drawn else ""))


if __name__ == "__main__":
    cli.start_without_config(main)
