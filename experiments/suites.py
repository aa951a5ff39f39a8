"""What `experiments.eval --suite=...` can measure beside a run's own evaluation: each suite of hybrid_jax/evals, its flags, its table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from etils import epath
from rich.table import Table

from experiments.beginning import BEGINNING
from hybrid_jax.config import ConfigError, RunConfig

TASKS = flags.DEFINE_list("tasks", None, "Of --suite=lm and ruler: which of their tasks; by default those of the study.")
LENGTHS = flags.DEFINE_list("lengths", None, "Of --suite=held_out, mqar and ruler: tokens that the model reads at once, such as 1024,4096.")
PAIRS = flags.DEFINE_list(
    "pairs", None, "Of --suite=mqar: associations to keep in mind, such as 4,8,16; by default the run's, twice and four times as many."
)
EXAMPLES = flags.DEFINE_integer(
    "examples", None, "Of --suite=mqar, ruler, lm and completion: the most examples of each size of problem, task or file.", lower_bound=1
)
FILES = flags.DEFINE_list("files", None, "Of --suite=completion: .jsonl or .parquet files with the fields text and value.")
DATA = flags.DEFINE_string("data", None, "Of --suite=lm: the folder of the tasks' data sets; docs/evaluation.md says what it holds.")
DOWNLOAD = flags.DEFINE_boolean("download", False, "Of --suite=lm: let lm-evaluation-harness fetch its data sets.")
INCLUDE_PATH = flags.DEFINE_string("include_path", None, "Of --suite=lm: a folder of task files in the harness's format.")
NUM_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "Of --suite=lm: examples in a prompt; by default as each task says.", lower_bound=0)
SOURCE = flags.DEFINE_string("source", None, "Of --suite=held_out: whose held-out text; by default the run's, of a mix it has to be said.")
TEXTS = flags.DEFINE_string("texts", None, "Of --suite=ruler: the folder of essays and questions; docs/evaluation.md says what it holds.")
MAX_LENGTH = flags.DEFINE_integer("max_length", 2048, "Of --suite=lm and completion: tokens of a text; longer ones are cut.", lower_bound=2)
BATCH = flags.DEFINE_integer("batch", 8, "Of all suites: texts that each device reads at once.", lower_bound=1)
for _flag in (LENGTHS, PAIRS):
    flags.register_validator(
        _flag,
        lambda values: values is None or (values and all(value.isdecimal() and int(value) for value in values)),
        "must be positive integers with commas between them",
    )

Results = dict[str, Any]


class Suite(NamedTuple):
    """One kind of evaluation."""

    takes: tuple[str, ...]  # flags
    evaluate: Callable[[Any, epath.Path, RunConfig], Results]  # (model, workdir, its configuration) -> settings and scores, ready for JSON
    headline: Callable[[Results], dict[str, float]]  # the numbers that a report collects, by name
    table: Callable[[str, Results], Table]  # of a title
    draw: Callable[[Results, epath.Path, RunConfig], epath.Path] | None = None
    notes: Callable[[Results], list[str]] = lambda results: []  # what a reader of the numbers must know


OWN = ("tokens", "dtype")  # what a run's own evaluation takes


def asked(name: str | None, values: flags.FlagValues) -> list[str]:
    """The flags of the suite, or of a run's own evaluation, that ``values`` were given, as they are typed, in order.

    Raises ConfigError for one that it does not take or cannot do without, and for a file or folder that is not there.
    """
    takes = SUITES[name].takes if name else OWN
    given = sorted(flag for flag in values if values[flag].present)
    for flag in given:
        takers = [other for other, suite in SUITES.items() if flag in suite.takes]
        if takers and flag not in takes:
            what = f"--suite={name}" if name else "an evaluation without --suite"
            raise ConfigError(f"--{flag} has no meaning for {what}, which takes {_flags(takes)}; it is for --suite={' or '.join(takers)}")
    for flag in (DATA, INCLUDE_PATH, TEXTS, FILES):
        paths = values[flag.name].value or []
        for path in [paths] if isinstance(paths, str) else paths:
            if not Path(path).exists():
                raise ConfigError(f"--{flag.name}={path}: there is no such file or folder")
    if name == "lm" and not (values["data"].value or values["include_path"].value or values["download"].value):
        raise ConfigError("--suite=lm needs --data=FOLDER, its tasks' data sets (docs/evaluation.md), or --download to have them fetched")
    if name == "completion" and not values["files"].value:
        raise ConfigError("--suite=completion needs --files, such as --files=based-fda.parquet,based-swde.parquet")
    return [values[flag].serialize() for flag in given if flag in takes]


def _flags(names: tuple[str, ...]) -> str:
    return ", ".join(f"--{name}" for name in names)


def _integers(flag: flags.FlagHolder, default: list[int]) -> list[int]:
    return default if flag.value is None else [int(value) for value in flag.value]


# ---------------------------------------------------------------- held-out text


def _held_out(model, workdir: epath.Path, config: RunConfig) -> Results:
    from hybrid_jax.data.sources import make_sources
    from hybrid_jax.evals import held_out
    from hybrid_jax.hf.convert import carried_tokenizer

    window = config.data.window
    if SOURCE.value is None and config.data.is_mix:
        raise ConfigError(f"the run's text is a mix: say whose held-out part is scored, --source={' or '.join(config.data.sources)}")
    _, source = make_sources(SOURCE.value or config.data.source, carried_tokenizer(workdir))
    source.check_vocabulary(config.model.vocabulary)
    tokens = flags.FLAGS.tokens or config.evaluation.tokens
    return held_out.evaluate(model, source, _integers(LENGTHS, [window, 2 * window, 4 * window]), tokens=tokens, batch=BATCH.value)


def _held_out_headline(results: Results) -> dict[str, float]:
    return {f"loss@{length}": score["loss"] for length, score in results["scores"].items()}


def _held_out_table(title: str, results: Results) -> Table:
    table = Table("window", "loss, nats a token", "perplexity", "bits per byte", title=title, title_style="bold")
    for length, score in results["scores"].items():
        table.add_row(f"{int(length):,}", *(f"{score[name]:.4f}" for name in ("loss", "perplexity", "bits_per_byte")))
    return table


def _draw_held_out(results: Results, file: epath.Path, config: RunConfig) -> epath.Path:
    from hybrid_jax.evals import held_out

    held_out.plot(results, file, trained=config.data.window)
    return file


# ---------------------------------------------------------------- associative recall


def _mqar(model, workdir: epath.Path, config: RunConfig) -> Results:
    from hybrid_jax.evals import recall

    trained = config.data.mqar
    most, longest = max(trained.pairs), max(trained.length)
    pairs = _integers(PAIRS, sorted({*trained.pairs, *(n for n in (2 * most, 4 * most) if n <= trained.alphabet)}))
    lengths = _integers(LENGTHS, sorted({*trained.length, 2 * longest, 4 * longest}))
    options = {"alphabet": trained.alphabet, "examples": EXAMPLES.value or 256, "batch": BATCH.value}
    return recall.evaluate(model, pairs=pairs, lengths=lengths, **options)


def _mqar_table(title: str, results: Results) -> Table:
    cells = {tuple(map(int, name.split("x"))): share for name, share in results["scores"].items()}
    lengths = sorted({length for _, length in cells})
    table = Table("pairs", *(f"{length:,} tokens" for length in lengths), title=title, title_style="bold")
    for pairs in sorted({pairs for pairs, _ in cells}):
        table.add_row(str(pairs), *(f"{cells[pairs, length]:.1%}" if (pairs, length) in cells else "" for length in lengths))
    return table


# ---------------------------------------------------------------- RULER


def _ruler(model, workdir: epath.Path, config: RunConfig) -> Results:
    from hybrid_jax.evals import ruler

    return ruler.evaluate(
        model,
        tasks=TASKS.value or tuple(ruler.TASKS),
        lengths=_integers(LENGTHS, [4096]),
        examples=EXAMPLES.value or 500,
        texts=TEXTS.value,
        batch=BATCH.value,
        beginning=BEGINNING.value,
    )


def _ruler_headline(results: Results) -> dict[str, float]:
    """Each group and task, the mean over the lengths; "average" is that of the tasks, and has each length's own beside it."""
    lengths = [str(length) for length in results["settings"]["lengths"]]
    groups = [results["groups"][length] for length in lengths]
    by_name = {"average" if name == "mean" else name: [group[name] for group in groups] for name in groups[0]}
    by_name |= {task: [scores[length]["score"] for length in lengths] for task, scores in results["scores"].items()}
    found = {name: sum(values) / len(values) for name, values in by_name.items()}
    if len(lengths) > 1 and "average" in by_name:
        found |= {f"average@{length}": value for length, value in zip(lengths, by_name["average"], strict=True)}
    return found


def _ruler_notes(results: Results) -> list[str]:
    """Which tasks are made of texts that are not RULER's."""
    sources = {task: next(iter(scores.values()))["source"] for task, scores in results["scores"].items()}
    return [f"{task} made of {source}" for task, source in sources.items() if "substitute" in source]


def _ruler_table(title: str, results: Results) -> Table:
    lengths = [str(length) for length in results["settings"]["lengths"]]
    table = Table("task", *(f"{int(length):,} tokens" for length in lengths), "made of", title=title, title_style="bold")
    for task, scores in results["scores"].items():
        table.add_row(task, *(f"{scores[length]['score']:.1%}" for length in lengths), scores[lengths[0]]["source"])
    table.add_section()
    for group in results["groups"][lengths[0]]:
        table.add_row(group, *(f"{results['groups'][length][group]:.1%}" for length in lengths), "")
    return table


# ---------------------------------------------------------------- lm-evaluation-harness


def _lm(model, workdir: epath.Path, config: RunConfig) -> Results:
    try:
        from hybrid_jax.evals import harness
    except ModuleNotFoundError as error:
        raise ConfigError(f"--suite=lm needs lm-evaluation-harness, and there is no {error.name}: pip install -e '.[eval]'") from None
    return harness.evaluate(
        model,
        TASKS.value or tuple(harness.STUDY),
        data=DATA.value,
        include_path=INCLUDE_PATH.value,
        num_fewshot=NUM_FEWSHOT.value,
        limit=EXAMPLES.value,
        max_length=MAX_LENGTH.value,
        batch=BATCH.value,
        beginning=BEGINNING.value,
        download=DOWNLOAD.value,
    )


def _lm_headline(results: Results) -> dict[str, float]:
    from hybrid_jax.evals.harness import STUDY

    found = {}
    for task, scores in results["scores"].items():
        if (metric := STUDY.get(task, "acc")) in scores:
            found[task] = scores[metric]
    return found if results["average"] is None else found | {"average": results["average"]}


def _lm_table(title: str, results: Results) -> Table:
    table = Table("task", "metric", "score", "±", "documents", title=title, title_style="bold")
    for task, scores in results["scores"].items():
        metrics = [name for name in scores if name not in ("version", "num_fewshot", "documents") and not name.endswith("_stderr")]
        for metric in metrics:
            error = scores.get(f"{metric}_stderr")
            numbers = ("-" if x is None else f"{x:.4f}" for x in (scores[metric], error))
            table.add_row(task, metric, *numbers, f"{scores['documents']:,}" if scores["documents"] else "")
    if results["average"] is not None:
        table.add_section()
        table.add_row("the study's average", "", f"{results['average']:.4f}", "", "")
    return table


# ---------------------------------------------------------------- completion


def _completion(model, workdir: epath.Path, config: RunConfig) -> Results:
    from hybrid_jax.evals import completion

    options = {"max_length": MAX_LENGTH.value, "batch": BATCH.value, "limit": EXAMPLES.value, "beginning": BEGINNING.value}
    return completion.evaluate(model, FILES.value, **options)


def _completion_headline(results: Results) -> dict[str, float]:
    return {Path(file).stem: score["contains"] for file, score in results["scores"].items()} | {"average": results["average"]}


def _completion_table(title: str, results: Results) -> Table:
    table = Table("file", "right", "±", "rows", "cut", title=title, title_style="bold")
    for file, score in results["scores"].items():
        shares = ("-" if x is None else f"{x:.1%}" for x in (score["contains"], score["contains_stderr"]))
        table.add_row(Path(file).name, *shares, f"{score['rows']:,}", f"{score['cut']:,}")
    return table


SUITES = {
    "held_out": Suite(("lengths", "tokens", "source", "batch", "dtype"), _held_out, _held_out_headline, _held_out_table, _draw_held_out),
    "mqar": Suite(("pairs", "lengths", "examples", "batch", "dtype"), _mqar, lambda results: results["scores"], _mqar_table),
    "ruler": Suite(
        ("tasks", "lengths", "examples", "texts", "beginning", "batch", "dtype"), _ruler, _ruler_headline, _ruler_table, notes=_ruler_notes
    ),
    "lm": Suite(
        ("tasks", "examples", "data", "download", "include_path", "num_fewshot", "max_length", "beginning", "batch", "dtype"),
        _lm,
        _lm_headline,
        _lm_table,
    ),
    "completion": Suite(
        ("files", "examples", "max_length", "beginning", "batch", "dtype"), _completion, _completion_headline, _completion_table
    ),
}
