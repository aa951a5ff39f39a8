"""What to tell a person before hours are spent: the platform asked for, the time a step takes, what the data is not."""

import dataclasses
import importlib.util
from collections import Counter

import jax

from hybrid_jax.amounts import count, duration, quantity
from hybrid_jax.config import HGRN2, ConfigError, LogConfig, ModelConfig, RunConfig
from hybrid_jax.data.token_source import TokenSource
from hybrid_jax.data.tokenizers import Tokenizer
from hybrid_jax.train.throughput import training_flops
from pallas_kernels.checks import implementations_in

LONG_STEP = 60.0  # seconds
EXTRAS = {"tpu": "tpu", "gpu": "cuda13"}


def check_platform(platform: str) -> None:
    """Raise ConfigError unless JAX runs on ``platform`` ("any": on whatever there is)."""
    try:
        found = jax.default_backend()
    except RuntimeError as error:
        raise ConfigError(f"JAX finds no device ({error}): unset JAX_PLATFORMS, or install JAX for the device there is") from None
    if platform not in ("any", found):
        extra = EXTRAS.get(platform)
        install = f"on a machine that has one, install JAX for it (pip install -e '.[{extra}]'); or " if extra else ""
        raise ConfigError(f"config.platform={platform!r} was asked for and JAX finds only {found!r}: {install}pass --config.platform=any")


def check_logging(config: LogConfig) -> None:
    """Raise ConfigError where Weights & Biases is asked for and not installed."""
    if config.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError("log.wandb_project is set but Weights & Biases is not installed: pip install -e '.[wandb]'")


def notes(config: RunConfig, text: TokenSource, peak: float, carried: Tokenizer | None = None) -> list[str]:
    """What is allowed but likely not meant, each with what to type instead.

    peak: FLOP/s of all devices. carried: the tokenizer that came with the model, if any.
    """
    told = []
    tokens = config.train.steps * config.train.batch * config.data.window
    if config.data.source == "stdlib" and config.model.vocabulary > 4 * text.tokenizer.vocabulary:
        told.append(
            f"THIS IS NOT THE STUDY'S DATA: {quantity(len(text))} bytes of Python's standard library stand in for it. "
            "Build a token store with python -m experiments.tokenize and give it as --config.data.source=STORE"
        )
    if carried is not None and carried.fingerprint != text.tokenizer.fingerprint:
        told.append(
            f"{text.name} WAS TOKENIZED WITH A DIFFERENT TOKENIZER THAN THE MODEL'S OWN ({carried.name}), "
            "which generation and evaluation use. Build the store with python -m experiments.tokenize --tokenizer=WORKDIR/huggingface"
        )
    for part, share in text.parts:
        if (times := tokens * (1 - config.data.mqar.share) * share / len(part)) > 4:  # the other rows hold recall problems
            of = "text" if part is text else part.name
            told.append(f"the run of {quantity(tokens)} tokens reads its {quantity(len(part))} tokens of {of} {times:,.0f} times over")
    if config.optimizer.warmup_steps >= config.train.steps:
        told.append(
            f"the learning rate never reaches its peak: warm-up takes {config.optimizer.warmup_steps} steps, the run has "
            f"{config.train.steps}; give a smaller --config.optimizer.warmup_steps"
        )
    for name, heads in _heads(config.model).items():
        if heads % config.mesh.tensor:
            told.append(
                f"--config.mesh.tensor={config.mesh.tensor} does not divide the {count(heads, 'head')} of {name}: each device "
                f"computes all of them; a divisor of {heads} deals them out"
            )
    seconds = training_flops(config) / peak
    if seconds > LONG_STEP:
        told.append(_slow(config, seconds, peak))
    return told


def _heads(model: ModelConfig) -> dict[str, int]:
    """The heads of each kind of layer by which it is dealt out over devices: where several share keys, or values, the fewer."""
    counts = {}
    for mixer in dict.fromkeys([model.mixer, model.full_attention] if "attention" in model.layer_kinds else [model.mixer]):
        if isinstance(mixer, HGRN2):
            counts[mixer.name] = model.width // mixer.expand_ratio
        elif hasattr(mixer, "heads"):  # else channels are dealt out one by one
            counts[mixer.name] = getattr(mixer, "kv_heads", None) or mixer.heads
    return counts


def implementations(model: ModelConfig, found: dict[str, dict[str, list[str]]]) -> str:
    """Which implementation of its operators each layer uses, in one line. found: by :func:`implementations_of`."""
    counts = Counter(model.layer_kinds)

    def layers(kind: str) -> str:
        return f"{counts[kind]} {kind} (" + ", ".join(f"{operator}: {'+'.join(names)}" for operator, names in found[kind].items()) + ")"

    return "layers: " + "; ".join(layers(kind) for kind in counts)


def implementations_of(model: ModelConfig, step: str) -> dict[str, dict[str, list[str]]]:
    """Kind of layer -> operator -> implementations, of the text of a compiled training step."""
    return {kind: implementations_in(kind, step) for kind in dict.fromkeys(model.layer_kinds)}


def _slow(config: RunConfig, seconds: float, peak: float) -> str:
    batch, window = jax.device_count(), min(256, config.data.window)
    small = dataclasses.replace(
        config, data=dataclasses.replace(config.data, window=window), train=dataclasses.replace(config.train, batch=batch)
    )
    return (
        f"ONE STEP WILL TAKE AT LEAST {duration(seconds).upper()} on this {jax.default_backend()} "
        f"({training_flops(config):.2g} FLOP at {peak:.2g} FLOP/s), the run {duration(seconds * config.train.steps)}. "
        f"To try things out: the same --config with :tiny; or --config.train.batch={batch} --config.data.window={window}, "
        f"{duration(training_flops(small) / peak)} a step at least"
    )
