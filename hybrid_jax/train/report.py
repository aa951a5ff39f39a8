"""Steps and evaluations as they happen: measured, shown, written down, and stopped where they go nowhere."""

import time
from typing import Any

import jax
from etils import epath

from hybrid_jax.amounts import count
from hybrid_jax.config import RunConfig
from hybrid_jax.train.metrics import Metrics, by_doubling, read_rows
from hybrid_jax.train.progress import Display
from hybrid_jax.train.step import StepMetrics
from hybrid_jax.train.throughput import peak_flops, training_flops
from hybrid_jax.train.workdir import RunError, evaluation_file, write_evaluation


class Report:
    """A run's metrics from ``step`` on, ``skipped`` steps of those before it, to its folder and to the person watching it."""

    def __init__(self, config: RunConfig, workdir: epath.Path, name: str, step: int, skipped: int = 0):
        self.config, self.workdir = config, workdir
        self.display = Display(config.train.steps, step)
        self.metrics = Metrics(workdir, config, name, step) if jax.process_index() == 0 else None
        self.tokens = config.train.batch * config.data.window  # a step
        self.flops = training_flops(config)
        self.peak, self.peak_source = peak_flops()
        self.first = self.last = step  # steps reported so far
        self.skipped = skipped
        self.started = self.mark = time.perf_counter()
        self.training_seconds = 0.0  # evaluations and saves left out
        self._seconds_a_step: float | None = None

    def step(self, step: int, metrics: StepMetrics) -> None:
        """Report a step, waiting for it if it is still under way. Raises RunError after too many bad ones in a row."""
        metrics = jax.device_get(metrics)
        now = time.perf_counter()
        seconds, self.mark = now - self.mark, now
        self.training_seconds += seconds
        # a mean over about ten steps
        self._seconds_a_step = seconds if self._seconds_a_step is None else 0.9 * self._seconds_a_step + 0.1 * seconds
        self.last, self.skipped = step, int(metrics.skipped)
        row = {
            "loss": float(metrics.loss),
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": float(metrics.learning_rate),
            "tokens": step * self.tokens,
            "tokens_per_second": self.tokens / self._seconds_a_step,
            "mfu": self.flops / self._seconds_a_step / self.peak,
            "skipped": self.skipped,
        }
        logged = step % self.config.train.log_every == 0 or step in (1, self.config.train.steps)
        self.display.step(step, row, (self.config.train.steps - step) * self._seconds_a_step, line=logged)
        if metrics.skipped_in_a_row:
            self.say(f"step {step}: the loss or its gradient is not finite; the step is skipped ({metrics.skipped_in_a_row} in a row)")
        if logged and self.metrics:
            positions = by_doubling(metrics.total_by_position, metrics.weight_by_position)
            self.metrics.write(step, {**row, "loss_by_position": positions})
        self._check(step, int(metrics.skipped_in_a_row))

    def _check(self, step: int, in_a_row: int) -> None:
        if in_a_row >= self.config.train.bad_steps:
            raise RunError(
                f"stopped after step {step}: the loss or its gradient was not finite {count(in_a_row, 'step')} in a row (train.bad_steps); "
                f"the parameters are still those of step {step - in_a_row}, and the checkpoints in {self.workdir} are whole. "
                "In another --workdir, try a lower --config.optimizer.learning_rate, more --config.optimizer.warmup_steps, "
                "or --config.model.dtype=float32"
            )

    def evaluation(self, step: int, results: dict[str, Any]) -> None:
        """Report an evaluation: a line, a row of metrics, and eval-STEP.json."""
        self.say(f"step {step}: held-out {in_short(results)}")
        if self.metrics:
            self.metrics.write(step, {"evaluation": {key: value for key, value in results.items() if key != "loss_by_position"}})
            self.metrics.flush()  # before the file that says that this evaluation is done
            write_evaluation(evaluation_file(self.workdir, step), step, results)

    def flush(self) -> None:
        """Return when all that was reported is in the workdir; before a checkpoint from which a run may go on."""
        if self.metrics:
            self.metrics.flush()

    def start_clock(self) -> None:
        """Leave out what happened since the last step: it was no training."""
        self.mark = time.perf_counter()

    def say(self, text: str) -> None:
        """Show a line."""
        self.display.say(text)

    def speed(self) -> dict[str, Any]:
        """How fast training went, over all steps reported; where only an evaluation was left to do, as was last written down."""
        if self.training_seconds:
            a_second = (self.last - self.first) / self.training_seconds
        else:
            a_second = [row for row in read_rows(self.workdir / "metrics.jsonl") if "loss" in row][-1]["tokens_per_second"] / self.tokens
        return {
            "seconds": time.perf_counter() - self.started,
            "tokens_per_second": a_second * self.tokens,
            "mfu": a_second * self.flops / self.peak,
            "peak": self.peak_source,
            "skipped": self.skipped,
        }

    def close(self) -> None:
        self.display.close()
        if self.metrics:
            self.metrics.close()


def in_short(results: dict[str, Any]) -> str:
    """An evaluation in one line."""
    text = f"loss {results['loss']:.4f}, {results['bits_per_byte']:.4f} bits per byte (xz -9 {results['xz_bits_per_byte']:.4f})"
    return text + (f", recall {results['mqar_accuracy']:.1%}" if "mqar_accuracy" in results else "")
