"""Build a token store from text files, to train on.

    python -m experiments.tokenize --input='fineweb-edu/*.parquet' --output=stores/fineweb-edu --tokenizer=gla-tokenizer/ --workers=16
    python -m experiments.tokenize --input=notes/ --output=stores/notes                  # .txt and .jsonl in a folder, as bytes
    python -m experiments.tokenize --input='gs://BUCKET/*.parquet' --output=gs://BUCKET/tokens --shard=3/64   # the fourth of 64 such

Reads .txt (a document a file), .jsonl (plain, .gz, .zst) and .parquet, on disk or in a bucket. Killed, it goes on where it was when the
same command is run again. Shards may run in any order, anywhere that sees the files and the folder of the store; the one that finds
the parts of all others there lays them into the store. Ends with the command that trains on it.
"""

import contextlib
import os
import re
import sys
import time

from absl import flags
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments import cli
from hybrid_jax.amounts import count
from hybrid_jax.config import ConfigError
from hybrid_jax.data.build import build_store
from hybrid_jax.data.store import lacks

INPUT = flags.DEFINE_multi_string("input", None, "The text: a file, a folder or a quoted glob, or the URL of one")
OUTPUT = flags.DEFINE_string("output", None, "The folder of the store, or its URL. While it is made it takes twice the room.")
TOKENIZER = flags.DEFINE_string(
    "tokenizer", "bytes", '"bytes", a Hugging Face tokenizer.json, a SentencePiece tokenizer.model, or a folder that holds one.'
)
DOCUMENT_END = flags.DEFINE_string("document_end", None, "The token put after each document, where the tokenizer does not say.")
TEXT_FIELD = flags.DEFINE_string("text_field", "text", "The field of JSON records, and the column of Parquet tables, that holds the text.")
VALIDATION_FRACTION = flags.DEFINE_float("validation_fraction", 0.005, "Share of the documents held out, chosen by a hash of their text.")
SHARD = flags.DEFINE_string("shard", "0/1", "i/n: make the i-th, from 0, of n shares of the store.")
WORKERS = flags.DEFINE_integer("workers", None, "Processes that tokenize; by default one for each CPU that may be used.", lower_bound=1)

FEW = 10_000_000  # tokens, too few for the models of the study's sizes


def usable_cpus() -> int:
    """Those that this process may use, of which SLURM, taskset or PYTHON_CPU_COUNT may have left it fewer than there are."""
    if hasattr(os, "process_cpu_count"):  # from Python 3.13 on
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def progress():
    """What shows how far a build is: bars in a terminal; in a log a line every ten seconds and one at the end of each phase."""
    if not sys.stderr.isatty():
        yield log_progress(time.monotonic())
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done)

        yield show


def log_progress(shown: float):
    def log(phase: str, done: int, total: int) -> None:
        nonlocal shown
        if done == total or time.monotonic() - shown >= 10:
            shown = time.monotonic()
            unit = "bytes" if phase == "tokenizing" else "tokens"
            print(f"{phase}: {done / max(total, 1):.1%} of {total:,} {unit}", file=sys.stderr, flush=True)

    return log


@flags.validator("shard", "give i/n, of n shards the i-th from 0, such as --shard=0/64 to --shard=63/64")
def is_shard(text: str) -> bool:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    return match is not None and int(match[1]) < int(match[2])


def main() -> int:
    if not INPUT.value or not OUTPUT.value:
        raise ConfigError("give the text and the folder of the store, such as --input='my_texts/*.txt' --output=my_store")
    started = time.monotonic()
    i, n = map(int, SHARD.value.split("/"))
    try:
        with progress() as show:
            manifest = build_store(
                INPUT.value,
                OUTPUT.value,
                tokenizer=TOKENIZER.value,
                document_end=DOCUMENT_END.value,
                text_field=TEXT_FIELD.value,
                validation_fraction=VALIDATION_FRACTION.value,
                shard=(i, n),
                workers=WORKERS.value or usable_cpus(),
                progress=show,
            )
    except KeyboardInterrupt:
        sys.exit("stopped: run the same command again to go on")
    seconds = time.monotonic() - started
    if not manifest["complete"]:
        missing = manifest["missing"]
        print(f"shard {SHARD.value} is done ({seconds:.0f} s)")
        print(f"not there yet: {len(missing):,} of {count(manifest['parts'], 'part')} of the store, such as one of {missing[0]}")
        print("the shard that makes the last of them finishes the store; if none is at work any more, run without --shard")
        return 0
    for split, numbers in manifest["splits"].items():
        print(f"{split}: {count(numbers['documents'], 'document')}, {numbers['tokens']:,} tokens, {numbers['bytes']:,} bytes of text")
    tokenizer = manifest["tokenizer"]
    print(f"{OUTPUT.value} is finished ({seconds:.0f} s): tokenizer {tokenizer['name']}, vocabulary {tokenizer['vocabulary']}")
    if why := lacks(manifest["splits"]):
        print(f"it cannot be trained on as it is: it has {why}")
        return 0
    size = ":tiny" if manifest["splits"]["train"]["tokens"] < FEW else ""
    print(f"train on it: python -m experiments.train --config=configs/gla_r6.py{size} --config.data.source={OUTPUT.value}")
    return 0


if __name__ == "__main__":
    cli.start_without_config(main)
