"""Print what a configuration is: its layers, parameters, and what a token and a sequence cost.

    python -m experiments.describe --config=configs/gla_r6.py
    python -m experiments.describe --config=configs/gla_r6.py:1b3 --context=32768
"""

from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import cli, folder
from hybrid_jax import layout
from hybrid_jax.config import ModelConfig

CONTEXT = flags.DEFINE_integer("context", None, "Tokens of the sequence whose costs are told; default: the training window.", lower_bound=1)

flags.FLAGS["workdir"].help = "A run, its folder or gs://BUCKET/FOLDER, whose configuration is taken where there is no --config."


def layer_map(model: ModelConfig) -> str:
    """The stack as the scans it folds into, such as "4 x (5 gla + 1 attention)"."""

    def stage(s: layout.Stage) -> str:
        runs = " + ".join(f"{run.length} {run.kind}" for run in s.runs)
        return f"{s.repeats} x ({runs})" if s.repeats > 1 else runs

    return ", ".join(stage(s) for s in layout.stages(model.layer_kinds))


def rows(model: ModelConfig, context: int) -> list[tuple[str, str]]:
    """What is printed: (name, value)."""
    from hybrid_jax import costs

    forward = costs.flops_per_token(model, context)
    full = [layer for layer, kind in enumerate(model.layer_kinds) if kind == "attention"]
    return [
        ("parameters", f"{costs.parameters(model):,}"),
        ("layers", layer_map(model)),
        ("full-attention layers", "all" if len(full) == model.layers else ", ".join(map(str, full)) or "none"),
        ("width, MLP, vocabulary", f"{model.width}, {model.mlp_hidden}, {model.vocabulary}{' (tied)' if model.tied else ''}"),
        ("recurrent state per sequence", f"{costs.state_bytes(model):,} bytes at any length"),
        (f"KV cache per sequence of {context:,} tokens", f"{costs.cache_bytes(model, context):,} bytes"),
        (f"FLOPs per token (sequence of {context:,})", f"{forward:.4g} forward, {3 * forward:.4g} training"),
    ]


def main(run: cli.Run) -> None:
    context = CONTEXT.value or run.config.data.window
    table = Table(title=run.name, show_header=False)
    for row in rows(run.config.model, context):
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    cli.start(main, folder.WORKDIR)
