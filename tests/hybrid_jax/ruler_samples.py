"""Tokenizers, and a folder with the texts of RULER in their files' formats, that its tests share."""

import hashlib
import json
import random
import re
from pathlib import Path

from hybrid_jax.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, Tokenizer
from hybrid_jax.evals.ruler.tasks import TASKS
from hybrid_jax.evals.ruler.texts import Texts
from tests.hybrid_jax.data_samples import bpe_tokenizer


class Words(Tokenizer):
    """An id for every word, number, mark and line break, about as many as a subword tokenizer gives; ids are not reversible."""

    name, vocabulary, document_end, files = "words", 257, 256, {}

    def encode_batch(self, texts):
        return [[len(word) for word in re.findall(r"[^\W\d]{1,6}|\d{1,3}|[^\w ]|_", text)] for text in texts]


BYTES, WORDS = ByteTokenizer(), Words()
TOKENIZERS = BYTES, WORDS, HuggingFaceTokenizer(bpe_tokenizer(["</s>"]), "</s>", "bpe")
SEED, EXAMPLES = 42, 10  # of the digests


def cases() -> list[tuple[str, Tokenizer, int]]:
    """What lm-evaluation-harness is compared at. With bytes its ruler_vt never ends: no solved example fits the 500 tokens it gives one."""
    cases = [(task, WORDS, length) for task in TASKS for length in (1024, 4096)]
    return cases + [(task, BYTES, 8192) for task in TASKS if task != "ruler_vt"]


def digest(rows) -> str:
    """Of rows (prompt, answers, tokens)."""
    return hashlib.sha256(json.dumps([list(row) for row in rows]).encode()).hexdigest()


def write_folder(folder: Path) -> Path:
    """Made-up texts; sentences with abbreviations, questions without an answer, with several, and with white space at their end."""
    rng = random.Random(3)
    (folder / "essays").mkdir(parents=True)
    for i in range(40):
        (folder / f"essays/{i:02d}.txt").write_text(_essay(rng), encoding="utf-8")
    for base in (folder, folder / "nltk_data/tokenizers"):
        punkt = base / "punkt_tab/english"
        punkt.mkdir(parents=True)
        (punkt / "abbrev_types.txt").write_text("dr\ne.g\nu.s\nmr")
        (punkt / "sent_starters.txt").write_text("however\nthe\n")
        (punkt / "collocations.tab").write_text("##number##\tthings\nmr\tyoung\n")
        (punkt / "ortho_context.tab").write_text("the\t126\nyoung\t46\nstartup\t40\nit\t78\n")
    (folder / "dev-v2.0.json").write_text(json.dumps(_squad(rng)))
    (folder / "hotpot_dev_distractor_v1.json").write_text(json.dumps(_hotpot()))
    return folder


def _essay(rng: random.Random) -> str:
    words = "the startup Dr. Young e.g. U.S. 3.5 it things, \u201cwell\u201d caf\u00e9 (or) however Mr. The 7. It founders wrote a new idea"
    ends = [". ", "? ", "! ", "... ", '." ', ".\n\n", ".) "]
    sentences = (" ".join(rng.choices(words.split(), k=rng.randint(3, 25))) + rng.choice(ends) for _ in range(rng.randint(5, 60)))
    return "".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


def _squad(rng: random.Random) -> dict:
    squad = Texts().squad  # its facts, in the file's format
    articles = {}
    for question in squad.questions:
        (own,) = question.documents
        asked = articles.setdefault(min(own, *question.related), {}).setdefault(own, [])
        answers = [{"text": answer, "answer_start": 0} for answer in question.answers for _ in range(rng.randint(1, 3))]
        answers += [{"text": "The other\u2019s", "answer_start": 1}] * rng.randint(0, 1)
        asked.append({"question": question.query + rng.choice(["", "", " "]), "id": "x", "answers": answers, "is_impossible": False})
        asked.append({"question": "Which is not told?", "id": "y", "answers": [], "is_impossible": True})
    paragraphs = [[{"context": squad.documents[i], "qas": qas} for i, qas in article.items()] for article in articles.values()]
    return {"version": "v2.0", "data": [{"title": str(i), "paragraphs": part} for i, part in enumerate(paragraphs)]}


def _hotpot() -> list[dict]:
    hotpot = Texts().hotpot
    rows = []
    for question in hotpot.questions:
        texts = [hotpot.documents[i].split("\n") for i in question.documents]
        context = [[title, re.split(r"(?<=\.)(?= )", text)] for title, text in texts]
        rows.append({"_id": "x", "question": question.query, "answer": question.answers[0], "context": context, "type": "bridge"})
    return rows
