"""RULER (Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?", 2024): 13 tasks at any context length.

results = hybrid_jax.evals.ruler.evaluate(model, lengths=(1024, 4096))

Examples are made here, with the model's tokenizer, equal to those of lm-evaluation-harness 0.4.13 for the same seed: what is
measured there and here is one benchmark. docs/evaluation.md says what each task asks, which texts some of them need, and how
the equality is shown.
"""

from hybrid_jax.evals.ruler.measure import evaluate
from hybrid_jax.evals.ruler.tasks import GROUPS, TASKS

__all__ = ["GROUPS", "TASKS", "evaluate"]
