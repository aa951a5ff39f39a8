"""RULER: every task is that of lm-evaluation-harness, can be solved, fits its length; a model's scores are those of its texts."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrid_jax
from hybrid_jax import config
from hybrid_jax.data import DataError
from hybrid_jax.evals import ruler
from hybrid_jax.evals.ruler import measure, needles, questions, score, tracing, wordlists
from hybrid_jax.evals.ruler.tasks import GROUPS, TASKS, make_examples
from hybrid_jax.evals.ruler.texts import Texts
from tests.hybrid_jax import ruler_samples
from tests.hybrid_jax.ruler_samples import BYTES, TOKENIZERS, WORDS
from tests.hybrid_jax.test_model import build

TEXTS = Texts()  # substitutes
NIAH = [name for name in TASKS if name.startswith("niah")]
SHORTEST = {tokenizer: 900 if tokenizer is WORDS else 2300 for tokenizer in TOKENIZERS}  # at which every task has an example
HARNESS = json.loads((Path(__file__).parent / "ruler_digests.json").read_text())


def make(task, tokenizer=WORDS, texts=TEXTS, **options):
    return list(make_examples(task, tokenizer, texts, **({"examples": 2} | options))[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ruler_samples.write_folder(tmp_path_factory.mktemp("ruler") / "texts")


@pytest.fixture(scope="module")
def given_texts(folder):
    return Texts(folder)


@pytest.mark.parametrize("case", ruler_samples.cases(), ids=lambda case: f"{case[0]}, {case[1].name}, {case[2]}")
def test_examples_are_those_of_the_harness(case, given_texts):
    """Digests that lm_eval itself made: ``python -m tests.parity.ruler_harness > tests/hybrid_jax/ruler_digests.json``."""
    task, tokenizer, length = case
    rows = make(task, tokenizer, given_texts, length=length, examples=ruler_samples.EXAMPLES, seed=ruler_samples.SEED)
    assert ruler_samples.digest(rows) == HARNESS["digests"][f"{task}, {tokenizer.name}, {length}"]


def solve_needles(prompt: str) -> list[str]:
    """The values of the keys that are asked for, in their order."""
    context, question = prompt.rsplit("\nWhat ", 1)
    hidden = {}
    for key, value in re.findall(r"One of the special magic \w+ for (.+?) is: (\S+)\.(?= |\n|$)", context):
        hidden.setdefault(key, []).append(value)
    query = re.search(r"special magic \w+ for (.+?) mentioned in", question)[1]
    return [value for key in query.replace(", and ", ", ").split(", ") for value in sorted(hidden[key])]


def solve_tracing(prompt: str) -> list[str]:
    """The last of the texts, followed from the value on."""
    text = prompt[prompt.rindex("Memorize and track") :]
    value = re.search(r"assigned the value (\d+)", text)[1]
    links = dict(re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})", text))
    chain = []
    while len(chain) < len(links):
        chain += [new for new, old in links.items() if old == (chain[-1] if chain else value)]
    return chain


def solve_common(prompt: str) -> list[str]:
    counts = Counter(re.findall(r"\d+\. (.+?)(?= \d+\. |\n|$)", prompt[prompt.index("\n") : prompt.index("\nQuestion")]))
    (_, least), *rest = counts.most_common()[9:]
    assert all(least > count for _, count in rest)
    return [word for word, _ in counts.most_common(10)]


def solve_frequent(prompt: str) -> list[str]:
    counts = Counter(prompt[prompt.index("coded words. ") : prompt.index("\nQuestion")].split()[2:])
    (dots, _), *frequent, (_, third), (_, fourth) = counts.most_common(5)
    assert dots == "..." and third > fourth
    return [word for word, _ in counts.most_common(4)[1:]]


@st.composite
def requests(draw, names):
    tokenizer = draw(st.sampled_from(TOKENIZERS))
    length = draw(st.one_of(st.integers(SHORTEST[tokenizer], 5000), st.integers(5000, 20_000)))
    return (
        draw(st.sampled_from(names)),
        tokenizer,
        max(length, 9000 if tokenizer is not WORDS and length >= 4096 else 0),
        draw(st.integers(0, 2**32 - 1)),
    )


def step_text(task: str, length: int) -> str:
    """What one step more would have put into a prompt, about: the most that may be missing."""
    needle = needles.NEEDLE.format(kind="uuids", key="a0" * 18, value="a0" * 18) + "\n"
    lines = 25 if length >= 4096 else 5
    if task in ("niah_multikey_2", "niah_multikey_3"):
        return needle * lines
    if task == "niah_single_1":
        return (needles.NOISE + "\n") * lines
    if task in NIAH:
        return " ".join(max((TEXTS.essays.words[i : i + 500] for i in range(0, 60_000, 500)), key=lambda words: sum(map(len, words))))
    if task == "ruler_vt":
        return tracing.NOISE * tracing.STEP
    documents = TEXTS.squad.documents if task == "ruler_qa_squad" else TEXTS.hotpot.documents
    return "\n\nDocument 100:\n".join(sorted(documents, key=len)[-questions.STEP :])


@settings(deadline=None, max_examples=150)
@given(requests(list(TASKS)))
def test_lengths(request):
    """Within the limit, and no further below it than a step of the hay is long."""
    task, tokenizer, length, seed = request
    for example in make(task, tokenizer, length=length, seed=seed):
        start = 60 if tokenizer is WORDS else 250  # of the answer, which the niah tasks do not count
        taken = len(tokenizer.encode(example.prompt)) + TASKS[task].new_tokens
        assert abs(taken - example.tokens) <= start + (0 if task != "ruler_vt" else 15)
        assert example.tokens <= length + (TASKS[task].new_tokens if task == "ruler_fwe" else 0)
        if task == "ruler_cwe":  # half of it is a solved example that is measured and not given
            assert example.tokens > length / 4
        elif task == "ruler_fwe":  # in other words than those that the length was measured with: to the third tokenizer maybe shorter ones
            assert example.tokens > (0.8 if tokenizer in (BYTES, WORDS) else 0.5) * length
        else:
            assert example.tokens > length - 1.25 * len(tokenizer.encode(step_text(task, length))) - 50


@settings(deadline=None, max_examples=80)
@given(requests(NIAH))
def test_needles_can_be_found(request):
    task, tokenizer, length, seed = request
    made = TASKS[task].make.__self__
    for example in make(task, tokenizer, length=length, seed=seed):
        found = solve_needles(example.prompt)
        assert len(example.answers) == made.values * made.queries
        if made.hay == "needles":  # a thousand random ones, of which two may have one key
            assert set(example.answers) <= set(found)
        elif made.values == 1:
            assert found == example.answers  # in the order they are asked for
        else:
            assert sorted(found) == sorted(example.answers)


@settings(deadline=None, max_examples=80)
@given(requests(["ruler_vt", "ruler_cwe", "ruler_fwe"]))
def test_tracing_and_words_can_be_solved(request):
    task, tokenizer, length, seed = request
    solve = {"ruler_vt": solve_tracing, "ruler_cwe": solve_common, "ruler_fwe": solve_frequent}[task]
    for example in make(task, tokenizer, length=length, seed=seed):
        found = solve(example.prompt)
        assert (found == example.answers) if task == "ruler_vt" else (sorted(found) == sorted(example.answers))


@settings(deadline=None, max_examples=50)
@given(requests(["ruler_qa_squad", "ruler_qa_hotpot"]), st.booleans())
def test_questions_have_their_documents(given_texts, request, are_given):
    task, tokenizer, length, seed = request
    texts = given_texts if are_given else TEXTS
    source = texts.squad if task == "ruler_qa_squad" else texts.hotpot
    for question, example in zip(source.questions, make(task, tokenizer, texts, length=length, seed=seed), strict=False):
        assert example.answers == question.answers and question.query in example.prompt
        own = [source.documents[number] for number in question.documents]
        assert all(document in example.prompt for document in own)
        assert any(question.answers[0] in document for document in own)


def test_the_shot_of_tracing_is_solved_and_changes():
    shots = [example.prompt.split("\n\n\n\n")[0] for example in make("ruler_vt", length=2048, examples=4)]
    assert len(set(shots)) == 4
    for shot in shots:
        text, solved = shot.rsplit("they are: ", 1)
        assert len(solved.split()) == 5 and all(f"VAR {name} =" in text for name in solved.split())


def test_an_example_depends_on_its_seed_task_and_length_alone():
    few, many = make("niah_multikey_3", examples=2), make("niah_multikey_3", examples=5)
    assert few == many[:2] and few == make("niah_multikey_3")
    assert few != make("niah_multikey_3", seed=43)


def test_keys_are_every_adjective_and_noun_sorted():
    """Of a few of the words, those whose order among each other is not that of the adjectives among them."""
    keys = wordlists.keys()
    nouns = wordlists.english_words("noun")
    places = [0, 1, len(keys) // 3, len(keys) - 1]
    sample = [keys[i] for i in [*places, *range(2_700_000, 2_700_100)]]
    assert len(set(sample)) == len(sample) and sample[4:] == sorted(sample[4:])
    high = sorted({f"{adjective}-{noun}" for adjective in ("high", "high-pitched") for noun in nouns})
    start = keys.index(high[0])
    assert [keys[i] for i in range(start, start + len(high))] == high
    with pytest.raises(IndexError):
        keys[len(keys)]


@pytest.mark.parametrize(
    ("text", "share", "some"),
    [("It is 12, and ABC.", 1.0, 1.0), ("abc", 0.5, 1.0), ("a\x00bc 1 2", 0.0, 0.0), ("", 0.0, 0.0), ("12\x0012", 0.5, 1.0)],
)
def test_scores(text, share, some):
    assert score.share_found(text, ["12", "aBc"]) == share and score.any_found(text, ["12", "aBc"]) == some


@pytest.fixture(scope="module")
def model():
    model = build(config.GLA(heads=2), layers=1, ratio=None, vocabulary=257)
    model.tokenizer = BYTES
    return model


def test_a_models_scores_are_those_of_what_it_writes(model):
    results = ruler.evaluate(model, tasks=["ruler_qa_squad"], lengths=(700, 900), examples=3, batch=2)
    assert json.loads(json.dumps(results)) == results
    assert results["groups"] == {"700": {}, "900": {}}
    rows = make("ruler_qa_squad", BYTES, length=900, examples=3)
    found = [hybrid_jax.generate(model, [row.prompt], max_new_tokens=32)[0] for row in rows]
    shares = [
        sum(answer.lower() in text.lower() for answer in row.answers) / len(row.answers) for text, row in zip(found, rows, strict=True)
    ]
    result = results["scores"]["ruler_qa_squad"]["900"]
    assert result["score"] == pytest.approx(sum(shares) / 3) and result["any"] == pytest.approx(sum(map(bool, shares)) / 3)
    assert result["tokens"] == pytest.approx(sum(row.tokens for row in rows) / 3) and result["examples"] == 3
    assert result["source"].startswith("substitute: ")


def test_the_beginning_stands_before_every_prompt(model, monkeypatch):
    read = []

    def write(model, prompts, *_, **__):
        read.append(prompts)
        return [""] * len(prompts)

    monkeypatch.setattr(measure, "write", write)
    plain, begun = (
        ruler.evaluate(model, tasks=["ruler_qa_squad"], lengths=(700,), examples=2, beginning=beginning) for beginning in (None, 1)
    )
    assert read[1] == [[1, *prompt] for prompt in read[0]] and plain["scores"] == begun["scores"]
    assert (plain["settings"]["beginning"], begun["settings"]["beginning"]) == (None, 1)


def oracle(model, tokens, max_new_tokens, **_):
    """Solves all but the questions, and of three answers to frequent words tells two; in capitals, where that does not matter."""
    solve = {"Memorize and": solve_tracing, "Below": solve_common, "Read the": lambda prompt: solve_frequent(prompt)[:2]}
    prompts = [model.tokenizer.decode(prompt) for prompt in tokens]
    solvers = [next((function for start, function in solve.items() if prompt.startswith(start)), solve_needles) for prompt in prompts]
    return [
        "nothing" if prompt.startswith("Answer") else " ".join(function(prompt)).upper()
        for function, prompt in zip(solvers, prompts, strict=True)
    ]


def test_groups_are_means_over_tasks(model, monkeypatch, folder):
    monkeypatch.setattr(measure, "write", oracle)
    results = ruler.evaluate(model, lengths=(2300,), examples=3, texts=folder)
    scores = {task: by_length["2300"]["score"] for task, by_length in results["scores"].items()}
    expected = dict.fromkeys(TASKS, 1.0) | {"ruler_fwe": 2 / 3, "ruler_qa_squad": 0.0, "ruler_qa_hotpot": 0.0}
    assert scores == pytest.approx(expected)
    groups = {"Single": 1, "MK": 1, "MQ": 1, "MV": 1, "CWE+FWE": 5 / 6, "QA": 0, "VT": 1, "mean": (10 + 2 / 3) / 13}
    assert results["groups"]["2300"] == pytest.approx(groups) and list(groups) == list(GROUPS)
    assert {len(names) for names in GROUPS.values()} == {1, 2, 3, 13}
    assert results["settings"]["texts"] == str(folder) and results["settings"]["tokenizer"] == "bytes"
    sources = {task: by_length["2300"]["source"] for task, by_length in results["scores"].items()}
    assert sources["niah_single_2"] == f"{folder / 'essays'} (40 texts), sentences by Punkt"
    assert sources["ruler_qa_hotpot"] == str(folder / "hotpot_dev_distractor_v1.json")


def test_essays_without_punkt_and_in_other_files(tmp_path):
    (tmp_path / "essays").mkdir()
    (tmp_path / "essays/all.jsonl").write_text('{"text": "One two. Three\\n\\nfour"}\n{"text": "five! Six"}\n')
    essays = Texts(tmp_path).essays
    assert essays.words == "One two. Three four five! Six".split()
    assert essays.sentences(5) == ["One two.", "Three four five!"]
    assert essays.source == f"{tmp_path / 'essays'} (2 texts), substitute for Punkt: sentences end at . ! ?"
    assert Texts(tmp_path).squad.source == "substitute: generated facts"


def test_mistakes(model, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "write", None)  # all are found before the model is asked
    for options, match in (
        (dict(tasks=["niah_single_4"]), "no task 'niah_single_4'; did you mean 'niah_single_"),
        (dict(tasks=["x"]), "no task 'x'; there are niah_single_1, .*ruler_qa_hotpot"),
        (dict(tasks=[]), r"tasks is \[\], needs one at least"),
        (dict(lengths=(1024, 1024)), "needs one at least, and none twice"),
        (dict(lengths=(0,)), "a length is 0, needs to be at least 1"),
        (dict(examples=0), "examples is 0, needs"),
        (dict(batch=0), "batch is 0, needs"),
        (
            dict(lengths=(2300, 300)),
            r"niah_single_1 at length 300 has no room for any example: the shortest takes about \d+ tokens of 'bytes'",
        ),
        (dict(tasks=["ruler_qa_squad"], examples=5000), "has 2000 questions"),
        (dict(texts=tmp_path), "holds none of essays, dev-v2.0.json, hotpot_dev_distractor_v1.json"),
    ):
        with pytest.raises(DataError, match=match):
            ruler.evaluate(model, **({"lengths": (2300,), "examples": 2} | options))
    (tmp_path / "dev-v2.0.json").write_text("{}")
    with pytest.raises(DataError, match="dev-v2.0.json does not have the format of its name .*KeyError"):
        ruler.evaluate(model, lengths=(2300,), texts=tmp_path)
    (tmp_path / "essays").mkdir()
    (tmp_path / "punkt_tab").mkdir()
    with pytest.raises(DataError, match="no .*abbrev_types.txt: give the whole of NLTK's punkt_tab/english"):
        ruler.evaluate(model, lengths=(2300,), texts=tmp_path)
    monkeypatch.setattr(model, "tokenizer", None)
    with pytest.raises(DataError, match="no tokenizer"):
        ruler.evaluate(model)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: tokenizer.name)
def test_the_length_that_an_error_names_is_enough(task, tokenizer):
    with pytest.raises(DataError, match="the shortest takes about") as told:
        make(task, tokenizer, length=100)
    needed = int(re.search(r"about (\d+) tokens", str(told.value))[1])
    assert make(task, tokenizer, length=round(1.15 * needed))
    with pytest.raises(DataError):
        make(task, tokenizer, length=round(0.8 * needed))
