"""Let a model write: what follows a prompt is printed as it is written.

    python -m experiments.generate --workdir=runs/gla_r6-tiny --prompt='def '                # the likeliest text
    python -m experiments.generate --workdir=runs/gla_r6-tiny --prompt='def ' --temperature=0.8 --top_p=0.95 --seed=1
    python -m experiments.generate --workdir=gla-1.3B --prompt='Once upon a time' --stop='\\n\\n' --beginning=1  # <s>, if trained with it
    python -m experiments.generate --workdir=runs/gla_r6-tiny --interactive                  # in turns; it remembers them

--workdir is a training run, a converted checkpoint, or a Hugging Face folder of flash-linear-attention. Where that has no
tokenizer, give one (--tokenizer) or prompt with token ids (--prompt_tokens=17,4,99), and get token ids. Text ends at the
tokenizer's end of a document, at a --stop string, or after --max_new_tokens; Ctrl-C ends it sooner.
"""

import os
import sys

from absl import flags

from experiments import checkpoint, cli, folder
from experiments.beginning import BEGINNING
from experiments.dtype import DTYPE
from hybrid_jax.config import ConfigError
from hybrid_jax.storage import run_folder
from hybrid_jax.train.workdir import keep_programs

PROMPT = flags.DEFINE_string("prompt", None, "The text to go on from.")
PROMPT_TOKENS = flags.DEFINE_list("prompt_tokens", None, "Token ids to go on from, such as 17,4,99; token ids are printed.")
INTERACTIVE = flags.DEFINE_boolean("interactive", False, "Take turns: each line typed is read, and what follows is written.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "The most tokens to write; with --interactive in each turn.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "What logits are divided by before a token is drawn; 0: always the likeliest token.")
TOP_K = flags.DEFINE_integer("top_k", None, "Draw only from so many of the likeliest tokens, such as 50.")
TOP_P = flags.DEFINE_float("top_p", None, "Draw only from the fewest tokens whose probabilities add up to this, such as 0.95.")
MIN_P = flags.DEFINE_float("min_p", None, "Draw only from tokens of at least this share of the likeliest one's probability, such as 0.05.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws: the same seed, the same text.")
STOP = flags.DEFINE_multi_string("stop", [], "A string that ends the text, in which \\n is a new line")
TOKENIZER = flags.DEFINE_string("tokenizer", None, 'In place of the model\'s own: "bytes", a tokenizer.json or .model, or a folder of one.')

flags.FLAGS["workdir"].help = "The model: the folder of a training run, or gs://BUCKET/FOLDER, or a Hugging Face folder."


def main() -> int:
    if sum(value is not None for value in (PROMPT.value, PROMPT_TOKENS.value, INTERACTIVE.value or None)) != 1:
        raise ConfigError("give one of --prompt=TEXT, --prompt_tokens=IDS and --interactive")
    if PROMPT.value == "":
        raise ConfigError("--prompt is empty: give at least one character")
    if BEGINNING.value is not None and PROMPT_TOKENS.value is not None:
        raise ConfigError("--beginning stands before texts: put it first in --prompt_tokens")
    if folder.WORKDIR.value is None:
        raise ConfigError("give the --workdir of a training run, such as --workdir=runs/gla_r6-tiny, or a Hugging Face folder")
    workdir = run_folder(folder.WORKDIR.value)
    if not (workdir / "config.json").exists():
        raise ConfigError(f"{workdir} holds no model: it has no config.json; give that of a training run, or a Hugging Face folder")

    import hybrid_jax
    from hybrid_jax.data.tokenizers import load_tokenizer
    from hybrid_jax.generation import Session
    from hybrid_jax.hf import convert
    from hybrid_jax.sampling import sampling

    if os.access(workdir, os.W_OK) and not convert.is_folder(workdir):  # a run on a file system, and one's own
        keep_programs(workdir)
    try:
        settings = sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value, MIN_P.value)
        model = hybrid_jax.load(workdir, checkpoint.STEP.value, DTYPE.value)
        if TOKENIZER.value is not None:
            model.tokenizer = load_tokenizer(TOKENIZER.value)
        if model.tokenizer is None and PROMPT_TOKENS.value is None:
            given = "give one (--tokenizer=FOLDER or --tokenizer=bytes)"
            raise ConfigError(f"{workdir} has no tokenizer: {given}, or prompt with --prompt_tokens=IDS")
        session, first = Session(model, 1, SEED.value), [] if BEGINNING.value is None else [BEGINNING.value]
        if INTERACTIVE.value:
            converse(session, settings, first)
        elif PROMPT.value is not None:
            turn(session, first + model.tokenizer.encode(PROMPT.value), settings, echo=PROMPT.value)
        else:
            turn(session, _token_ids(PROMPT_TOKENS.value), settings, texts=False)
    except ValueError as error:  # about an option or a prompt, and it says which
        raise ConfigError(str(error)) from None
    return 0


def converse(session, settings, first: list[int]) -> None:
    """Turn by turn: a line from standard input, then what follows it; ``first``: tokens before all there is."""
    print("Type some text and press Enter (\\n for a new line); the model goes on from all there was. Ctrl-C ends a turn, Ctrl-D all.")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print()
            continue
        except EOFError:
            print()
            return
        if line:
            turn(session, first + session.model.tokenizer.encode(_new_lines(line)), settings)
            first = []


def turn(session, tokens: list[int], settings, *, echo: str = "", texts: bool = True) -> None:
    """Read ``tokens`` and print what follows them as it is written, after ``echo``, until its end or Ctrl-C."""
    from hybrid_jax.train.signals import Stop

    with Stop() as asked:
        session.read([tokens], room=MAX_NEW_TOKENS.value)
        print(echo, end="", flush=True)
        for _, piece in session.write(MAX_NEW_TOKENS.value, settings, stop=[_new_lines(stop) for stop in STOP.value], texts=texts):
            print(piece, end="" if texts else " ", flush=True)
            if asked.name:
                break
    print()


def _new_lines(text: str) -> str:
    return text.replace("\\n", "\n")


def _token_ids(words: list[str]) -> list[int]:
    try:
        return [int(word) for word in words]
    except ValueError:
        raise ConfigError(f"--prompt_tokens={','.join(words)} must be integers with commas between them") from None


if __name__ == "__main__":
    cli.start_without_config(main)
