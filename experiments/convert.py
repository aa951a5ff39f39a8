"""Take a Hugging Face checkpoint of flash-linear-attention (fla) as a run of ours, give a run back as one, or begin a run with another.

    python -m experiments.convert --from_hf=FOLDER --workdir=runs/theirs        # config.json and safetensors, to a run at step 0
    python -m experiments.train --workdir=runs/theirs --config.train.steps=100  # goes on from there
    python -m experiments.convert --to_hf=FOLDER --workdir=runs/theirs          # what fla and transformers load

There and back is bit for bit. Tokenizer files come along, in WORKDIR/huggingface. What the parameters of a run of ours go on to:

    python -m experiments.convert --from_run=runs/gla_r6-tiny --workdir=runs/longer    # its newest checkpoint, or --step=N, as step 0
    python -m experiments.train --workdir=runs/longer --config.data.window=1024        # any data, steps and optimiser; the same model,
        --config.model.attention.rope_theta=100000                                     # but for its full attention's positions and window
"""

import contextlib
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from experiments import checkpoint, cli, folder
from experiments.dtype import DTYPE
from hybrid_jax.config import ConfigError
from hybrid_jax.storage import run_folder
from hybrid_jax.train.workdir import read_config

FROM_HF = flags.DEFINE_string("from_hf", None, "The Hugging Face folder to read; --workdir becomes a run that starts from it.")
FROM_RUN = flags.DEFINE_string("from_run", None, "The run whose parameters are read; --workdir becomes a run that starts from them.")
TO_HF = flags.DEFINE_string("to_hf", None, "The folder to write as a Hugging Face checkpoint, from the run in --workdir.")
TO_DTYPE = flags.DEFINE_enum(
    "to_dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "The dtype that --to_hf writes; default: that in which the tensors came (of a run of ours: float32).",
)

flags.FLAGS["workdir"].help = "The folder of the run, or gs://BUCKET/FOLDER: --from_hf or --from_run makes it, --to_hf reads it."


def main() -> int:
    if sum(flag.value is not None for flag in (FROM_HF, TO_HF, FROM_RUN)) != 1:
        raise ConfigError("give one of --from_hf=FOLDER (to read), --to_hf=FOLDER (to write) and --from_run=RUN (to begin a run with)")
    if folder.WORKDIR.value is None:
        raise ConfigError("give the --workdir of the run: the one to make (--from_hf, --from_run), or the one to write (--to_hf)")
    if FROM_HF.value is not None and checkpoint.STEP.value is not None:
        raise ConfigError("--step is of --to_hf and --from_run: a Hugging Face folder has no steps, and becomes step 0")
    if TO_HF.value is None and TO_DTYPE.value:
        raise ConfigError("--to_dtype is of --to_hf: parameters are read as they are")
    if FROM_HF.value is None and DTYPE.value:
        raise ConfigError("--dtype is of --from_hf, what the run computes in; what --to_hf writes is --to_dtype")
    if FROM_RUN.value is not None:
        return begin_with_another()
    if "://" in (FROM_HF.value or TO_HF.value):
        raise ConfigError(f"{FROM_HF.value or TO_HF.value} is no folder of a file system: copy it (gcloud storage cp --recursive)")
    workdir = run_folder(folder.WORKDIR.value)
    run = None if TO_HF.value is None else read_config(workdir)

    from hybrid_jax import costs
    from hybrid_jax.hf import convert

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(highlight=False))
    task = bar.add_task("reading" if FROM_HF.value is not None else "writing", total=None)
    with contextlib.ExitStack() as shown:

        def advance(elements: int, total: int) -> None:
            if not bar.live.is_started:  # what cannot be converted is refused before the first tensor
                shown.enter_context(bar)
            bar.update(task, advance=elements, total=total)

        if FROM_HF.value is not None:
            run = convert.from_hf(Path(FROM_HF.value), workdir, DTYPE.value, advance)
        else:
            step = convert.to_hf(workdir, Path(TO_HF.value), checkpoint.STEP.value, TO_DTYPE.value, advance)
    size = f"{costs.parameters(run.model):,} parameters"
    if FROM_HF.value is not None:
        print(f"{workdir}: {size} at step 0. To go on from there: python -m experiments.train --workdir={workdir}")
    else:
        print(f"{TO_HF.value}: {size} of {workdir}, step {step}")
    return 0


def begin_with_another() -> int:
    source, workdir = run_folder(FROM_RUN.value), run_folder(folder.WORKDIR.value)
    read_config(source)  # raises where there is none, before JAX is started

    from hybrid_jax import costs
    from hybrid_jax.hf import convert

    run, step = convert.from_run(source, workdir, checkpoint.STEP.value)
    print(
        f"{workdir}: {costs.parameters(run.model):,} parameters of {source}, step {step}, at step 0. "
        f"To go on from there: python -m experiments.train --workdir={workdir}, "
        "with any --config but another model (its full attention may have another rope_theta or window)"
    )
    return 0


if __name__ == "__main__":
    cli.start_without_config(main)
