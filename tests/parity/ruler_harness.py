"""What lm-evaluation-harness itself gives a model on RULER's tasks, without a network.

    python -m tests.parity.ruler_harness > tests/hybrid_jax/ruler_digests.json     # what tests/hybrid_jax/test_ruler.py holds ours against

Needs lm_eval[ruler]. Only its sources of bytes are replaced: the tokenizer, the essays, the two downloads, NLTK's data folder.
"""

import contextlib
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import nltk
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from tests.hybrid_jax import ruler_samples

with mock.patch.object(nltk, "download"), contextlib.redirect_stdout(sys.stderr):  # it goes for NLTK's data when imported, and says so
    from lm_eval.tasks.ruler import common_utils, prepare_niah


class _Adapter:
    """A tokenizer of ours as transformers' are called."""

    def __init__(self, tokenizer):
        self.encode = tokenizer.encode

    def __call__(self, text):
        return mock.Mock(input_ids=self.encode(text))


class _Response:
    def __init__(self, file: Path):
        self.file = file

    def raise_for_status(self):
        pass

    def json(self):
        return json.loads(self.file.read_text())


def samples(task: str, tokenizer, *, length: int, seed: int, folder: Path) -> list[dict]:
    """All 500 samples of a run of ``lm_eval --model=dummy --tasks=TASK --seed=SEED``: prompt, answers, tokens, new_tokens."""
    sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)  # as in a process of its own: it has shuffles that go on from run to run
    prepare_niah.get_haystack.cache_clear()
    prepare_niah.cached_sent_tokenize.cache_clear()
    common_utils.get_tokenizer.cache_clear()
    nltk.tokenize._get_punkt_tokenizer.cache_clear()
    essays = {"text": [file.read_text() for file in sorted((folder / "essays").glob("*.txt"))]}
    with (
        mock.patch.object(common_utils.AutoTokenizer, "from_pretrained", lambda *_, **__: _Adapter(tokenizer)),
        mock.patch("datasets.load_dataset", lambda *_, **__: essays),
        mock.patch("requests.get", lambda url, **_: _Response(folder / url.rsplit("/", 1)[1])),
        mock.patch.object(nltk.data, "path", [str(folder / "nltk_data")]),
        contextlib.redirect_stdout(sys.stderr),  # it prints the sizes it tries
    ):
        metadata = {"max_seq_lengths": [length], "tokenizer": f"{tokenizer.name} {length} {seed}"}
        manager = TaskManager(include_path=Path(common_utils.__file__).parent, include_defaults=False, metadata=metadata)
        results = simple_evaluate(
            model="dummy", tasks=[task], task_manager=manager, random_seed=seed, numpy_random_seed=seed,
            bootstrap_iters=0, log_samples=True,
        )  # fmt: skip
    logged = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [
        {
            "prompt": sample["arguments"][0][0],
            "answers": sample["doc"]["outputs"],
            "tokens": sample["doc"]["length"],
            "new_tokens": sample["arguments"][0][1]["max_gen_toks"],
        }
        for sample in logged
    ]


def main() -> None:
    """Print the digests of the first examples of every task."""
    with tempfile.TemporaryDirectory() as folder:
        texts = ruler_samples.write_folder(Path(folder) / "texts")
        digests = {}
        for task, tokenizer, length in ruler_samples.cases():
            found = samples(task, tokenizer, length=length, seed=ruler_samples.SEED, folder=texts)
            rows = [(row["prompt"], row["answers"], row["tokens"]) for row in found[: ruler_samples.EXAMPLES]]
            digests[f"{task}, {tokenizer.name}, {length}"] = ruler_samples.digest(rows)
    print(json.dumps({"lm_eval": version("lm_eval"), "digests": digests}, indent=2))


if __name__ == "__main__":
    main()
