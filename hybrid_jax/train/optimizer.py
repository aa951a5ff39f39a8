"""The optimisers a run can name, all of them optax's, and which parameters they decay or orthogonalise."""

from typing import Any

import jax
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from hybrid_jax.config import OptimizerConfig
from hybrid_jax.sharding import logical_axes

# Two-dimensional, yet no linear map between activations: orthogonalising them has no meaning, and Muon's authors use Adam.
NOT_ORTHOGONALIZED = {"vocabulary", "taps"}
MUON_MOMENTUM = 0.95


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> learning rate: linear warm-up to the peak, then as ``config.schedule`` says, to the final fraction at the last step."""
    first = config.learning_rate / (config.warmup_steps + 1)  # and so on by equal steps: no update is spent at a rate of zero
    warmup = optax.linear_schedule(first, config.learning_rate, config.warmup_steps)
    peak, final, left = config.learning_rate, config.learning_rate * config.final_fraction, max(1, steps - 1 - config.warmup_steps)
    if config.name == "schedule_free":
        after = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, left, config.final_fraction)
    else:
        falling = left if config.schedule == "linear" else config.decay_steps
        after = optax.linear_schedule(peak, final, falling, transition_begin=left - falling)
    return optax.join_schedules([warmup, after], [config.warmup_steps]) if config.warmup_steps else after


def make_optimizer(config: OptimizerConfig, steps: int, params: nnx.State) -> optax.GradientTransformation:
    """The optimiser of a run of ``steps`` steps. ``params`` (arrays or shapes) say which axes each parameter has.

    Vectors (gains, biases, decays: fewer than two axes beside the stacked layers) are never decayed. Under "muon" the
    matrices get Muon scaled to Adam's step size (arXiv 2502.16982), so that learning rate and decay keep their meaning;
    embeddings, output projections, convolution taps and vectors get Adam (with Nesterov's momentum, as Muon) without decay.
    ``beta1`` and ``beta2`` are then of Adam alone: the matrices have the momentum that Muon's authors use, `MUON_MOMENTUM`.
    """
    axes = jax.tree.structure(params).flatten_up_to(logical_axes(params))
    own = [tuple(name for name in names if name != "layers") for names in axes]
    tree = jax.tree.structure(params).unflatten
    matrices = tree([len(names) >= 2 for names in own])
    learning_rate = schedule(config, steps)
    match config.name:
        case "adamw":
            update = optax.adamw(learning_rate, config.beta1, config.beta2, config.eps, weight_decay=config.weight_decay, mask=matrices)
        case "muon":
            dimensions = [
                MuonDimensionNumbers(-2, -1) if len(names) == 2 and not NOT_ORTHOGONALIZED & set(names) else None for names in own
            ]
            update = optax.contrib.muon(
                learning_rate,
                beta=MUON_MOMENTUM,
                weight_decay=config.weight_decay,
                adam_b1=config.beta1,
                adam_b2=config.beta2,
                eps=config.eps,
                muon_weight_dimension_numbers=tree(dimensions),
                consistent_rms=0.2,
            )
        case "schedule_free":
            adam_without_momentum = optax.chain(
                optax.scale_by_rms(config.beta2, config.eps, eps_in_sqrt=False, bias_correction=True),
                optax.add_decayed_weights(config.weight_decay, matrices),
                optax.scale_by_learning_rate(learning_rate),
            )
            update = optax.contrib.schedule_free(adam_without_momentum, learning_rate, config.beta1)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def evaluation_params(config: OptimizerConfig, params: Any, opt_state: Any) -> Any:
    """The parameters to evaluate and to publish: the trained ones, or under "schedule_free" their average.

    opt_state: None for parameters that the optimiser has not seen.
    """
    if config.name != "schedule_free" or opt_state is None:
        return params
    return optax.contrib.schedule_free_eval_params(opt_state[-1], params)
