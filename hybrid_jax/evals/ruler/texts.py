"""The texts that some tasks need, from a folder, or what stands in for them where it does not have them.

    FOLDER/essays/                         Paul Graham's essays: .txt, a file each, or .jsonl or .parquet with a field "text"
    FOLDER/punkt_tab/english/              NLTK's sentence boundaries, the four files of its resource "punkt_tab"
    FOLDER/dev-v2.0.json                   SQuAD 2.0, as https://rajpurkar.github.io/SQuAD-explorer has it
    FOLDER/hotpot_dev_distractor_v1.json   HotpotQA, as https://hotpotqa.github.io has it

Any of them may be missing. Every result names its source; a stand-in is called "substitute".
"""

import json
import random
import re
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from hybrid_jax.data import DataError, documents

ESSAYS, PUNKT, SQUAD, HOTPOT = "essays", "punkt_tab", "dev-v2.0.json", "hotpot_dev_distractor_v1.json"
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Essays:
    """Prose to hide needles in.

    Attributes:
        words: all of it, cut at white space.
        source: what it is.
    """

    def __init__(self, text: str, split, source: str):
        self.words, self.source = text.split(), source
        self.sentences = lru_cache(maxsize=64)(lambda words: split(" ".join(self.words[:words])))  # of its first words: [str]


class Question(NamedTuple):
    """A question about documents, which are given by number."""

    query: str
    answers: list[str]
    documents: list[int]  # with what it takes to answer
    related: list[int]  # that go with those before any others do


class Questions(NamedTuple):
    """Questions, the documents they are about, and what they are."""

    questions: list[Question]
    documents: list[str]
    source: str


class Texts:
    """The texts of a folder, or what stands in for them, each read when first asked for.

    Raises `DataError` where the folder holds none of the texts.
    """

    def __init__(self, folder=None):
        known = (ESSAYS, SQUAD, HOTPOT)
        self.folder = None if folder is None else Path(folder)
        if self.folder and not any((self.folder / name).exists() for name in known):
            raise DataError(f"{folder} holds none of {', '.join(known)}: give a folder that does, or none, and substitutes are taken")

    @cached_property
    def essays(self) -> Essays:
        return _read_essays(self.folder)

    @cached_property
    def squad(self) -> Questions:
        return _read_squad(self.folder)

    @cached_property
    def hotpot(self) -> Questions:
        return _read_hotpot(self.folder)


def _read_essays(folder: Path | None) -> Essays:
    """The essays in ``folder``; else Python's own language reference, which every Python brings along."""
    split, splitter = _sentence_splitter(folder)
    if folder is None or not (folder / ESSAYS).is_dir():
        from pydoc_data.topics import topics  # prose of 65,000 words

        prose = " ".join(word for name in sorted(topics) for word in topics[name].split() if word.strip("*=-+|^~"))  # no rules and frames
        return Essays(prose, split, f"substitute: Python's language reference, {splitter}")
    units = documents.plan_units(documents.find_files([str(folder / ESSAYS)]))
    texts = [text for unit in units for text, _ in documents.read_documents(unit, "text")]
    return Essays(" ".join(texts), split, f"{folder / ESSAYS} ({len(texts)} texts), {splitter}")


def _sentence_splitter(folder: Path | None):
    """(a function of a text that gives its sentences, what it is)"""
    if folder is None or not (folder / PUNKT).is_dir():
        return SENTENCE_END.split, "substitute for Punkt: sentences end at . ! ?"
    try:
        from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer
    except ImportError:
        raise DataError(f"{folder / PUNKT} is read by the package nltk: pip install -e '.[eval]'") from None
    names = ("abbrev_types.txt", "sent_starters.txt", "collocations.tab", "ortho_context.tab")
    found = [folder / PUNKT / "english" / name for name in names]
    for file in found:
        if not file.is_file():
            raise DataError(f"no {file}: give the whole of NLTK's punkt_tab/english, or no {PUNKT} at all")
    rows = [[tuple(line.split("\t")) for line in file.read_text(encoding="utf-8").strip("\n").split("\n")] for file in found]
    parameters = PunktParameters()
    parameters.abbrev_types, parameters.sent_starters = ({word for (word,) in words} for words in rows[:2])
    parameters.collocations = set(rows[2])
    parameters.ortho_context.update((word, int(flags)) for word, flags in rows[3])
    return PunktSentenceTokenizer(parameters).tokenize, "sentences by Punkt"


def _read_squad(folder: Path | None) -> Questions:
    """SQuAD's questions that have an answer; a paragraph's article goes with it. Else facts about people, a town to an article."""
    file = folder and folder / SQUAD
    if not (file and file.is_file()):
        articles, source = _towns(), "substitute: generated facts"
    else:
        articles, source = _read_json(file, lambda content: [_article(article) for article in content["data"]]), str(file)
    numbers = _numbered({context for article in articles for context, _ in article})
    questions = []
    for article in articles:
        own = [numbers[context] for context, _ in article]
        for context, asked in article:
            related = [number for number in own if number != numbers[context]]
            questions += [Question(query, answers, [numbers[context]], related) for query, answers in asked]
    return Questions(questions, list(numbers), source)


def _article(article: dict[str, Any]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """[(paragraph, [(question, answers)])]"""
    return [
        (part["context"], [(a["question"], [x["text"] for x in a["answers"]]) for a in part["qas"] if not a["is_impossible"]])
        for part in article["paragraphs"]
    ]


def _read_hotpot(folder: Path | None) -> Questions:
    """HotpotQA's questions, each with the ten paragraphs that it is asked of. Else generated facts that take two steps."""
    file = folder and folder / HOTPOT
    if not (file and file.is_file()):
        rows, source = _books(), "substitute: generated facts"
    else:

        def row(content):
            return content["question"], [content["answer"]], [f"{title}\n{''.join(lines)}" for title, lines in content["context"]]

        rows, source = _read_json(file, lambda content: [row(question) for question in content]), str(file)
    numbers = _numbered({text for _, _, texts in rows for text in texts})
    return Questions([Question(query, answers, [numbers[x] for x in texts], []) for query, answers, texts in rows], list(numbers), source)


def _numbered(texts: set[str]) -> dict[str, int]:
    return {text: number for number, text in enumerate(sorted(texts))}


def _read_json(file: Path, read):
    try:
        return read(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} does not have the format of its name ({type(error).__name__}: {error}): get the file again") from None


def _towns() -> list:
    """Articles as `_article` gives them: 25 towns, 40 people each, two questions about each."""
    rng = random.Random(0)
    trades = ["baker", "printer", "surveyor", "glazier", "ferryman", "clockmaker", "gardener", "potter", "weaver", "beekeeper"]
    names = _names(rng, 2050)
    articles = []
    for town, people in zip(names[:25], range(25, 2025, 80), strict=True):
        paragraphs = []
        for first, last in zip(names[people : people + 80 : 2], names[people + 1 : people + 80 : 2], strict=True):
            born, trade, other = rng.randint(1700, 1920), rng.choice(trades), rng.choice(names[:25])
            text = (
                f"{first} {last} was born in {town} in {born}. After some years in {other}, {first} came back to {town} and worked as "
                f"a {trade} for {rng.randint(10, 40)} years. The house of {last} stood by the river, {rng.randint(2, 90)} steps off."
            )
            asked = (f"In which year was {first} {last} born?", [str(born)]), (f"What did {first} {last} work as?", [trade])
            paragraphs.append((text, list(asked)))
        articles.append(paragraphs)
    return articles


def _books() -> list[tuple[str, list[str], list[str]]]:
    """[(question, answers, ten paragraphs)]: who wrote a book, where its author lives, and eight others of the kind."""
    rng = random.Random(0)
    names = _names(rng, 2100)
    towns, authors, titles = names[:100], names[100:1100], names[1100:]
    homes = [rng.choice(towns) for _ in authors]
    books = [
        f"{t}\n{t} is a book of {rng.randint(90, 900)} pages by {a}. It has {rng.randint(5, 60)} parts."
        for t, a in zip(titles, authors, strict=True)
    ]
    lives = [
        f"{a}\n{a} is a writer who lives in {home}. {a} wrote {rng.randint(2, 30)} books." for a, home in zip(authors, homes, strict=True)
    ]
    rows = []
    for i, (title, home) in enumerate(zip(titles, homes, strict=True)):
        others = [rng.choice((books, lives))[j] for j in rng.sample([j for j in range(len(books)) if j != i], 8)]
        texts = [books[i], lives[i], *others]
        rng.shuffle(texts)
        rows.append((f"In which town does the author of {title} live?", [home], texts))
    return rows


def _names(rng: random.Random, count: int) -> list[str]:
    """Different names that can be said."""
    names = {}
    while len(names) < count:
        syllables = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") + rng.choice(["", "l", "n", "r"]) for _ in range(3))
        names["".join(syllables).capitalize()] = None
    return list(names)
