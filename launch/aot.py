"""Whether a run fits a TPU pod, or hosts with GPUs, and how fast it can be there at best, before they are rented: its training step
compiled ahead of time.

    python -m launch.aot --config=configs/gla_r6.py:1b3 --topology=v5e:16x16
    python -m launch.aot --config=configs/gla_r6.py:1b3 --topology=v5p:4x4x8 --mesh=data=8,fsdp=16 --effort=full
    python -m launch.aot --config=configs/gla_r6.py --topology=v6e:4x4 --slices=2 --mesh=data=2 --config.train.microbatch=2
    python -m launch.aot --config=configs/gla_r6.py:1b3 --topology=h100:4x8 --mesh=data=4
    python -m launch.aot --config=configs/gla_r6.py --topology=v5e:4x4 --sweep --compiles=8

It needs no TPU or GPU, only the compiler: pip install -e '.[tpu]' or '.[cuda13]'. The configuration is the trainer's, every field of it.
Printed, and appended as a line of JSON to --output, are: the bytes a device holds, by kind; FLOPs; the collectives, by the axes of the mesh
that they cross; which implementation each operator runs; the time of compilation; and a time below which no step can be, by the chip's
published rates, with the share of its FLOP/s that this leaves to the model.

--effort=quick compiles with XLA's least effort for speed, in a quarter of the time that a full compilation takes: the same kernels and
FLOPs, nearly the same collectives, memory that may be some hundred megabytes more or less; bytes to and from HBM are not known then, but
for the state's own. --effort=full compiles what a run compiles. For GPUs there is only that; the FLOPs of the kernels are not known then.

--sweep tries the meshes that the run can be dealt out on, remat policies and sequences a device holds at once (train.microbatch), which
change how fast a run is and not what it computes. What its state alone cannot hold is left out, and what holds more than one that did
not fit; at most --compiles of the others are compiled, the likeliest first, and ranked.

Exit code 0: it fits; 1: it does not; 2: a mistake in what was asked for.
"""

import os
from pathlib import Path

from absl import flags

from experiments import cli, folder
from experiments.compiled import targets
from hybrid_jax.config import ConfigError
from launch import topologies

TOPOLOGY = flags.DEFINE_string(
    "topology", None, "What to compile for: a TPU slice, as v5e:16x16, v5p:4x4x8, v4:2x2x1; or hosts x GPUs, as h100:4x8, h200:8."
)
SLICES = flags.DEFINE_integer(
    "slices", 1, "How many slices of the --topology, of TPUs: the outer part of the mesh's data axis.", lower_bound=1
)
MESH = flags.DEFINE_string("mesh", None, "Axes of the mesh, as data=4,fsdp=64; the configuration's where not given.")
EFFORT = flags.DEFINE_enum(
    "effort", "quick", ["quick", "full"], "How hard the TPU compiler tries to make the step fast: quick: least; full: as for a run."
)
SWEEP = flags.DEFINE_bool("sweep", False, "Try meshes, remat policies and microbatches, and rank those that fit.")
COMPILES = flags.DEFINE_integer("compiles", 12, "How many steps --sweep compiles at most.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "JSON lines file that rows are appended to; results/aot.jsonl if not given.")

flags.FLAGS["workdir"].help = "A run, its folder or gs://BUCKET/FOLDER, whose configuration is taken where there is no --config."


def main(run: cli.Run) -> int:
    if not TOPOLOGY.value:
        raise ConfigError("give --topology=KIND:TOPOLOGY, such as --topology=v5e:16x16 or --topology=h100:4x8 (hosts x GPUs)")
    target = topologies.find(TOPOLOGY.value, SLICES.value)
    config = run.config if MESH.value is None else topologies.with_mesh(run.config, MESH.value)
    on_gpus = isinstance(target, topologies.Hosts)
    if on_gpus:
        targets.cuda_root()
    else:
        targets.need_libtpu(target.name)
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: a TPU or GPU of this machine is not wanted

    from experiments.benchmarks import results, rows
    from launch import ahead, candidates, report

    effort = ahead.QUICK if EFFORT.value == "quick" and not on_gpus else 0.0
    output = Path(OUTPUT.value or "results/aot.jsonl")
    if SWEEP.value:
        found = candidates.find(config, target)
        report.announce(found, target, COMPILES.value)
    else:
        ahead.check(config, target)

    def compiled(case: report.Case) -> dict:
        return compiler.call(ahead.compile_ahead, case.config, case.target, effort)

    def measure(case: report.Case) -> dict:
        return results.append(rows.measure("aot", compiled, case), output)

    with ahead.compiler(target) as compiler:
        if SWEEP.value:
            return report.sweep(run.name, found, target, COMPILES.value, measure)
        return report.one(report.Case(run.name, config, target), measure)


if __name__ == "__main__":
    cli.start(main, folder.WORKDIR)
