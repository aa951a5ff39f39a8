"""What a run is: a model, its data, how it is trained, evaluated, kept, and over which devices."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Literal

from hybrid_jax.config.errors import need
from hybrid_jax.config.model import ModelConfig


@dataclass(frozen=True)
class MQARConfig:
    """Multi-query associative recall mixed into the training batches, and measured at every evaluation.

    Rows take turns among the kinds of problems, ``pairs[i]`` in ``length[i]`` tokens: small ones teach how, large ones how much.
    """

    share: float = 0.0  # share of a batch's rows that hold problems; 0: none
    pairs: tuple[int, ...] = (4,)  # associations of one problem
    length: tuple[int, ...] = (64,)  # tokens of one problem; a window holds as many as fit
    alphabet: int = 32  # distinct keys, and as many values
    examples: int = 64  # problems of each kind in the evaluation

    def __post_init__(self):
        need(0 <= self.share < 1, f"data.mqar.share={self.share} must be in [0, 1)")
        for name in ("pairs", "length", "alphabet", "examples"):
            values = getattr(self, name)
            need(min(values if isinstance(values, tuple) else [values], default=0) >= 1, f"data.mqar.{name}={values} must be at least 1")
        need(
            len(self.pairs) == len(self.length),
            f"data.mqar.pairs={self.pairs} and data.mqar.length={self.length} must be as many, a length for each number of pairs",
        )


@dataclass(frozen=True)
class DataConfig:
    """The text, and how it is cut into the rows of a batch."""

    # The text of Python's own standard library, or the folder or URL of a token store; or several of these with weights, "A=0.7,B=0.3".
    source: str = "stdlib"
    window: int = 4096  # T, tokens of a row
    # "windows": documents end to end, each token seeing all before it in its row. "documents": it sees those of its own document.
    packing: Literal["windows", "documents"] = "windows"
    mqar: MQARConfig = field(default_factory=MQARConfig)  # recall problems among the text

    def __post_init__(self):
        need(self.window >= 2, f"data.window={self.window} must be at least 2 tokens")
        need(
            min(self.sources.values()) > 0 and len(self.sources) == (self.source.count(",") + 1 if self.is_mix else 1),
            f"data.source={self.source!r} must name each source once, with a weight above 0",
        )
        need(
            self.mqar.share == 0 or max(self.mqar.length) <= self.window,
            f"data.mqar.length={self.mqar.length} must fit in data.window={self.window}",
        )

    @property
    def is_mix(self) -> bool:
        """Whether ``source`` is several, each with its weight."""
        return re.fullmatch(r"[^,]+=\d*\.?\d+(,[^,]+=\d*\.?\d+)+", self.source) is not None

    @property
    def sources(self) -> dict[str, float]:
        """{source: weight}, in their order; of a mix all have tokens of one tokenizer."""
        if not self.is_mix:
            return {self.source: 1.0}
        pairs = (part.rpartition("=") for part in self.source.split(","))
        return {source.strip(): float(weight) for source, _, weight in pairs}


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, Muon or schedule-free AdamW, and the learning rate, which warms up to its peak first."""

    name: Literal["adamw", "muon", "schedule_free"] = "adamw"  # muon: of most matrices, the rest has Adam
    learning_rate: float = 3e-4  # at its peak
    # After warm-up: "cosine" and "linear" fall until the last step; "wsd" (warm-up, stable, decay) stays at the peak and falls, linearly,
    # over the last ``decay_steps``. Under schedule_free the rate stays at its peak.
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    decay_steps: int | None = None  # of "wsd" alone: how many steps the rate falls over
    final_fraction: float = 0.1  # share of the peak that is left at the last step
    warmup_steps: int = 1024  # steps up to the peak, in equal parts
    beta1: float = 0.9  # under muon of what it leaves to Adam; its matrices' momentum is 0.95, its authors' value
    beta2: float = 0.95  # of the mean of squared gradients
    eps: float = 1e-8  # added to its root
    weight_decay: float = 0.1  # of matrices alone; Muon's: of those that it orthogonalises
    clip_norm: float = 1.0  # the global norm that gradients are scaled down to

    def __post_init__(self):
        for name in ("learning_rate", "eps", "clip_norm"):
            need(getattr(self, name) > 0, f"optimizer.{name}={getattr(self, name)} must be positive")
        for name in ("warmup_steps", "weight_decay"):
            need(getattr(self, name) >= 0, f"optimizer.{name}={getattr(self, name)} must not be negative")
        for name in ("beta1", "beta2"):
            need(0 <= getattr(self, name) < 1, f"optimizer.{name}={getattr(self, name)} must be in [0, 1)")
        need(self.beta1 > 0 or self.name != "schedule_free", "optimizer.beta1=0.0 must be positive: schedule_free divides by it")
        need(0 <= self.final_fraction <= 1, f"optimizer.final_fraction={self.final_fraction} must be in [0, 1]")
        need(
            self.name != "schedule_free" or self.schedule == "cosine",
            f"optimizer.schedule={self.schedule!r} has no meaning under schedule_free, whose rate stays at its peak: leave it out",
        )
        if self.schedule == "wsd":
            need(
                self.decay_steps is not None and self.decay_steps >= 1,
                f"optimizer.decay_steps={self.decay_steps} must be at least 1 for optimizer.schedule='wsd': a tenth of the steps, say",
            )
        else:
            need(
                self.decay_steps is None,
                f"optimizer.decay_steps={self.decay_steps} is of optimizer.schedule='wsd', and that is {self.schedule!r}: leave it out",
            )


@dataclass(frozen=True)
class TrainConfig:
    """How long, on how much at once."""

    steps: int = 40000  # how many there are in all
    batch: int = 128  # sequences a step, over all devices
    microbatch: int = 4  # sequences a device (of the data and fsdp axes) holds at once; the rest is accumulated
    seed: int = 42  # what the first parameters, the order of the text and the recall problems are drawn from
    log_every: int = 10  # steps between two rows of metrics
    bad_steps: int = 10  # stop after so many steps in a row with a gradient that is not finite

    def __post_init__(self):
        for name in ("steps", "batch", "microbatch", "log_every", "bad_steps"):
            need(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)} must be at least 1")
        need(self.seed >= 0, f"train.seed={self.seed} must not be negative")


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss, bits per byte and, where problems are mixed in, recall."""

    every: int | None = None  # steps between two evaluations; None: only at the end
    tokens: int = 2**20  # tokens of held-out text, at most
    batch: int = 8  # sequences read at once, over all devices

    def __post_init__(self):
        need(self.every is None or self.every >= 1, f"evaluation.every={self.every} must be at least 1 (None: only at the end)")
        need(self.tokens >= 1 and self.batch >= 1, "evaluation.tokens and evaluation.batch must be at least 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run goes on from."""

    # Steps between two checkpoints. The last step is always saved; so is, for good, the last one before the learning rate of "wsd" falls,
    # from which a longer run can go on.
    every: int = 1000
    keep: int = 3  # how many checkpoints, the newest, are kept
    keep_every: int | None = None  # those of steps that are a multiple of it are kept too, for good; None: only the newest

    def __post_init__(self):
        need(self.every >= 1 and self.keep >= 1, "checkpoint.every and checkpoint.keep must be at least 1")
        need(
            self.keep_every is None or self.keep_every >= 1 and self.keep_every % self.every == 0,
            f"checkpoint.keep_every={self.keep_every} must be a multiple of checkpoint.every={self.every}: what is kept has to be saved",
        )


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1, at one axis at most: all that remain."""

    data: int = 1  # rows of the batch
    fsdp: int = -1  # rows, and parameters with their optimiser state
    seq: int = 1  # stretches of every row
    tensor: int = 1  # heads, the MLP's hidden width, the vocabulary

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        need(all(size == -1 or size >= 1 for size in sizes), f"mesh sizes {sizes} must be at least 1, or -1 for the rest")
        need(sizes.count(-1) <= 1, f"mesh sizes {sizes}: only one axis can be -1")


@dataclass(frozen=True)
class LogConfig:
    """Where metrics go beside the run's metrics.jsonl."""

    tensorboard: bool = True  # TensorBoard files in the run's folder
    profile_steps: tuple[int, ...] = ()  # the first and the last of the steps that are traced, into the run's profile/; (): none
    wandb_project: str | None = None  # project at Weights & Biases; None: not logged there

    def __post_init__(self):
        need(
            not self.profile_steps or len(self.profile_steps) == 2 and 1 <= self.profile_steps[0] <= self.profile_steps[1],
            f"log.profile_steps={self.profile_steps} must be the first and the last step that is traced, such as (10, 12)",
        )


@dataclass(frozen=True)
class RunConfig:
    """Everything that makes a training run what it is."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log: LogConfig = field(default_factory=LogConfig)
    platform: Literal["any", "cpu", "gpu", "tpu"] = "any"  # where the run is to be: on another one it does not start

    def __post_init__(self):
        warmup, decay, steps = self.optimizer.warmup_steps, self.optimizer.decay_steps, self.train.steps
        need(
            decay is None or warmup + decay < steps,
            f"optimizer.warmup_steps={warmup} and optimizer.decay_steps={decay} together must be fewer than train.steps={steps}",
        )

        need(
            max(self.log.profile_steps, default=0) <= steps,
            f"log.profile_steps={self.log.profile_steps} must not be beyond train.steps={steps}",
        )

    @property
    def open_steps(self) -> int:
        """How many steps, from the first, have a learning rate that is the same whatever ``train.steps``; 0 where all are planned."""
        if self.optimizer.name == "schedule_free":
            return self.train.steps
        return self.train.steps - self.optimizer.decay_steps if self.optimizer.schedule == "wsd" else 0
