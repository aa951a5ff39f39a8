"""The harness's questions, answered as by slow definitions; its own tasks and local ones from end to end, on files alone."""

import json
import math
import socket
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows

import hybrid_jax
from hybrid_jax import config
from hybrid_jax.data import DataError
from hybrid_jax.data.tokenizers import ByteTokenizer
from hybrid_jax.evals import completion
from hybrid_jax.evals.harness import STUDY, HarnessModel, _generation, evaluate, study_average
from hybrid_jax.sampling import Sampling
from tests.hybrid_jax.eval_models import small_model

MAX_LENGTH = 64
SIZES = {"max_length": MAX_LENGTH, "batch": 4}  # the same in all tests, which then compile as one
TEXTS = ["", "The cat", "ends with spaces  ", "\n", "a" * 60, "é漢😀"]
CONTINUATIONS = [" sat", "x", " on the mat, where it had been before", "é"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a test asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    devices = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)


@pytest.fixture(scope="module")
def model():
    return small_model(config.GLA(heads=2, conv_width=4), ByteTokenizer(), layers=1, ratio=None)


@pytest.fixture(scope="module")
def logits(model):
    """tokens -> [T,vocabulary] float64 log-probabilities of what follows each."""
    forward = jax.jit(model)

    def log_probabilities(tokens):
        padded = jnp.array([[*tokens, *[0] * (MAX_LENGTH - len(tokens))]])
        return np.asarray(jax.nn.log_softmax(forward(padded)[0, : len(tokens)]), np.float64)

    return log_probabilities


def ask(lm, kind, *arguments):
    requests = [Instance(kind, doc={}, arguments=pair, idx=i) for i, pair in enumerate(arguments)]
    return getattr(lm, kind)(requests)


@pytest.mark.parametrize("beginning", [None, 257])
def test_loglikelihood_is_of_the_bytes_that_follow(model, logits, beginning):
    """A byte of text is a token, so that what a request means is plain: text, cut on the left, what is scored, of its end."""
    lm = HarnessModel(model, beginning=beginning, **SIZES)
    pairs = [(context, continuation) for context in TEXTS for continuation in CONTINUATIONS]
    first = 256 if beginning is None else beginning
    for (context, continuation), (found, greedy) in zip(pairs, ask(lm, "loglikelihood", *pairs), strict=True):
        spaces = len(context) - len(context.rstrip())  # they belong to what follows, where that leaves a context
        scored = list((context[len(context) - spaces :] + continuation).encode())
        before = list(context[: len(context) - spaces].encode())
        whole = ([first] if not before or beginning is not None else []) + before + scored
        kept = whole[-MAX_LENGTH - 1 :]
        of_each = logits(kept[:-1])[-len(scored) :]
        assert found == pytest.approx(of_each[np.arange(len(scored)), scored].sum(), rel=2e-5)
        assert greedy == (of_each.argmax(-1).tolist() == scored)


@pytest.mark.parametrize("beginning", [None, 257])
def test_rolling_counts_every_byte_once(model, logits, beginning):
    """And a beginning, which the harness's own models take for part of the text."""
    texts = ["short", "b" * MAX_LENGTH, "a long text, " * 10, ""]
    found = ask(HarnessModel(model, beginning=beginning, **SIZES), "loglikelihood_rolling", *((text,) for text in texts))
    first, begun = (256, []) if beginning is None else (beginning, [beginning])
    for text, total in zip(texts, found, strict=True):
        expected = 0.0
        for given, predicted in get_rolling_token_windows([*begun, *text.encode()], first, MAX_LENGTH, 1):
            expected += logits(given)[-len(predicted) :][np.arange(len(predicted)), predicted].sum()
        assert total == pytest.approx(expected, rel=2e-5)


def test_generation_is_cut_stopped_and_in_order(model):
    lm = HarnessModel(model, **SIZES)
    options = {"max_gen_toks": 10, "until": []}

    def answers(*of_each):
        return ask(lm, "generate_until", *zip(TEXTS, of_each, strict=True))

    found = answers(*[options] * len(TEXTS))
    prompts = [list(text.encode())[-(MAX_LENGTH - 10) :] or [256] for text in TEXTS]
    for prompt, tokens, written in zip(prompts, hybrid_jax.generate(model, prompts, max_new_tokens=10), found, strict=True):
        assert model.tokenizer.decode(prompt + tokens).endswith(written)
    stop = max(found, key=len)[3:5]
    again = answers(*[options | {"until": [stop, "no such text"]}] * len(TEXTS))
    assert again == [text.split(stop)[0] for text in found] and again != found
    drawn = options | {"do_sample": True, "temperature": 5.0}
    assert answers(*[drawn] * len(TEXTS)) != found
    mixed = answers(*[options, options | {"until": stop}] * (len(TEXTS) // 2))  # two groups, told apart
    assert mixed == [pair[i % 2] for i, pair in enumerate(zip(found, again, strict=True))]
    assert answers(*[drawn | {"do_sample": False}] * len(TEXTS)) == found


def test_a_tasks_options_of_a_generation():
    """Its filters and temperature where it draws, which it says; else the likeliest text."""
    draws = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "max_gen_toks": 7, "until": ["x", ""]}
    found = _generation({"do_sample": True} | draws)
    assert found == {"max_new_tokens": 7, "settings": Sampling(0.7, 5, 0.9, 0.1), "stop": ["x"]}
    assert _generation({"do_sample": False} | draws)["settings"] == Sampling()
    assert _generation({"do_sample": True, "until": []})["settings"] == Sampling(1.0)
    assert _generation({"until": ["\n"]}) == {"max_new_tokens": 256, "settings": Sampling(), "stop": ["\n"]}


def test_what_cannot_be_asked(model):
    lm = HarnessModel(model, **SIZES)
    with pytest.raises(ValueError, match="num_beams in its generation_kwargs; there are until"):
        ask(lm, "generate_until", ("a", {"num_beams": 4}))
    with pytest.raises(ValueError, match="64 new tokens leave no room for a prompt: max_length is 64"):
        ask(lm, "generate_until", ("a", {"max_gen_toks": 64}))
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        HarnessModel(SimpleNamespace(tokenizer=None))


CHOICE = """
task: colours
dataset_path: {path}
dataset_kwargs: {kwargs}
output_type: multiple_choice
test_split: test
training_split: train
doc_to_text: "{{{{question}}}} It is"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 3.0}}
"""
DOCUMENTS = [{"question": f"Which colour is the number {i}?", "choices": ["red", "light blue", "black"], "answer": i % 3} for i in range(7)]


def write_jsonl(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_local_task(model, logits, tmp_path):
    """From its YAML and JSON lines to accuracies, by hand and by the harness."""
    write_jsonl(tmp_path / "data" / "rows.jsonl", DOCUMENTS)
    kwargs = json.dumps({"data_files": {"test": str(tmp_path / "data/rows.jsonl"), "train": str(tmp_path / "data/rows.jsonl")}})
    (tmp_path / "colours.yaml").write_text(CHOICE.format(path="json", kwargs=kwargs[:-1] + f', "cache_dir": "{tmp_path}"' + "}"))
    results = evaluate(model, ["colours"], include_path=tmp_path, **SIZES)
    right, right_a_byte = [], []
    for document in DOCUMENTS:
        context = list(f"{document['question']} It is".encode())
        totals, sizes = [], []
        for choice in document["choices"]:
            scored = list(f" {choice}".encode())
            tokens = (context + scored)[-MAX_LENGTH - 1 :]
            totals.append(logits(tokens[:-1])[-len(scored) :][np.arange(len(scored)), scored].sum())
            sizes.append(len(choice))
        right.append(np.argmax(totals) == document["answer"])
        right_a_byte.append(np.argmax(np.array(totals) / sizes) == document["answer"])
    scores = results["scores"]["colours"]
    assert scores["acc"] == pytest.approx(np.mean(right)) and scores["acc_norm"] == pytest.approx(np.mean(right_a_byte))
    assert scores["acc_stderr"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
    assert (scores["version"], scores["documents"], scores["num_fewshot"]) == (3.0, 7, 0) and results["average"] is None
    assert results["settings"]["lm_eval"] and json.loads(json.dumps(results)) == results
    assert evaluate(model, ["colours"], include_path=tmp_path, limit=2, **SIZES)["scores"]["colours"]["documents"] == 2


def test_a_data_set_by_name_and_its_examples(model, tmp_path):
    (tmp_path / "colours.yaml").write_text(CHOICE.format(path="org/colours", kwargs="null"))
    write_jsonl(tmp_path / "org__colours/data/test.jsonl", DOCUMENTS)
    options = {"include_path": tmp_path, "data": tmp_path, "limit": 2} | SIZES
    zero = evaluate(model, ["colours"], **options)  # whose examples nobody asks for
    with pytest.raises(
        DataError, match=r"colours needs .*org__colours/data/train.parquet or .jsonl, from https://hugg.*/datasets/org/colours"
    ):
        evaluate(model, ["colours"], num_fewshot=1, **options)
    table = pyarrow.Table.from_pylist(DOCUMENTS)
    for part in range(2):
        pyarrow.parquet.write_table(table[part * 4 : part * 4 + 4], tmp_path / f"org__colours/data/train-0000{part}-of-00002.parquet")
    one = evaluate(model, ["colours"], num_fewshot=1, **options)
    assert zero["scores"]["colours"]["num_fewshot"] == 0 and one["scores"]["colours"]["num_fewshot"] == 1


ARC = {"question": "Which is hot?", "choices": {"text": ["the sun", "ice"], "label": ["A", "B"]}, "answerKey": "A"}
FILES = {
    "allenai__ai2_arc/ARC-Easy/test": [ARC] * 3,
    "allenai__ai2_arc/ARC-Challenge/test": [ARC, ARC | {"answerKey": "B"}],
    "Rowan__hellaswag/data/validation": [
        {"activity_label": "Cooking", "ctx_a": "A man", "ctx_b": "he", "endings": ["eats [step] it.", "flies.", "is", "to"], "label": "2"}
    ]
    * 2,
    "EleutherAI__lambada_openai/default/test": [{"text": "She had a hat and put on her hat"}] * 3,
    "allenai__openbookqa/main/test": [
        {"question_stem": "Water is", "choices": {"text": ["wet", "dry"], "label": ["A", "B"]}, "answerKey": "B"}
    ],
    "baber__piqa/data/validation": [{"goal": "Open a jar", "sol1": "turn the lid", "sol2": "sing", "label": 1}],
}


def test_the_study(model, tmp_path):
    """Its six tasks by the harness's own definitions, on files of the published layout."""
    for name, rows in FILES.items():
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    results = evaluate(model, data=tmp_path, **SIZES)
    assert list(results["scores"]) == sorted(STUDY)
    scores = [results["scores"][task][metric] for task, metric in STUDY.items()]
    assert results["average"] == pytest.approx(np.mean(scores)) and all(0 <= score <= 1 for score in scores)
    assert math.isfinite(results["scores"]["lambada_openai"]["perplexity"])
    assert study_average({"arc_easy": {"acc": 1.0}}) is None


def test_the_studys_average_is_by_its_own_metrics():
    """ARC-c, HellaSwag and OpenBookQA by acc_norm, ARC-e, LAMBADA and PIQA by acc, as docs/evaluation.md says."""
    by_acc_norm = {"arc_challenge": 0.1, "hellaswag": 0.2, "openbookqa": 0.3}
    by_acc = {"arc_easy": 0.4, "lambada_openai": 0.5, "piqa": 0.6}
    scores = {task: {"acc": 9.0, "acc_norm": score} for task, score in by_acc_norm.items()}
    scores |= {task: {"acc": score, "acc_norm": 9.0} for task, score in by_acc.items()}
    assert study_average(scores) == pytest.approx(2.1 / 6)


def test_every_missing_file_is_named_at_once(model, tmp_path):
    write_jsonl(tmp_path / "baber__piqa/data/validation.jsonl", FILES["baber__piqa/data/validation"])
    with pytest.raises(DataError) as error:
        evaluate(model, data=tmp_path)
    message = str(error.value)
    assert [name for name in FILES if f"{tmp_path}/{name}.parquet" in message] == [name for name in FILES if "piqa" not in name]
    assert "https://huggingface.co/datasets/Rowan/hellaswag" in message and "\n" not in message


def test_unknown_tasks_and_damaged_files(model, tmp_path):
    with pytest.raises(DataError, match="knows no task 'hellaswagg'; did you mean hellaswag"):
        evaluate(model, ["hellaswagg"], data=tmp_path)
    file = tmp_path / "baber__piqa/data/validation.jsonl"
    write_jsonl(file, [])
    for content, message in ((b'{"goal": 1}\nnot JSON\n', "validation.jsonl, line 2: not JSON"), (b"[1]\n", "not objects of one kind")):
        file.write_bytes(content)
        with pytest.raises(DataError, match=message):
            evaluate(model, ["piqa"], data=tmp_path)
    file.unlink()
    file.with_suffix(".parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="validation.parquet is not a readable Parquet file"):
        evaluate(model, ["piqa"], data=tmp_path)


def test_completion_is_the_harness_own(model, tmp_path):
    """Its FDA, the rules of `hybrid_jax.evals.completion` written down by others, on the same rows."""
    rows = [{"text": text or "of", "value": value, "doc_id": 1, "key": "k"} for text in TEXTS for value in "aeio%"]
    file = tmp_path / "hazyresearch__based-fda/default/validation.jsonl"
    write_jsonl(file, [row for row in rows if row["text"].strip()])
    theirs = evaluate(model, ["fda"], data=tmp_path, **SIZES)["scores"]["fda"]
    ours = completion.evaluate(model, [file], **SIZES)["scores"][str(file)]
    assert ours["contains"] == pytest.approx(theirs["contains"]) and 0 < ours["contains"] < 1
