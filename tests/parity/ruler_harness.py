"""What lm-evaluation-harness itself gives a model on RULER's tasks, without a network.

    python -m tests.parity.ruler_harness     # the digests that tests/hybrid_jax/test_ruler.py holds

Needs lm_eval[ruler]. Only its sources of bytes are replaced: the tokenizer, the essays, the two downloads, NLTK's data folder.
"""

import hashlib
import json
import random
import sys
from pathlib import Path
from unittest import mock

import nltk
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks.ruler import common_utils, prepare_niah

from tests.hybrid_jax import ruler_samples


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
        mock.patch("builtins.print"),
    ):
        metadata = {"max_seq_lengths": [length], "tokenizer": f"{tokenizer.name} {length} {seed}"}
        results = simple_evaluate(
            model="dummy", tasks=[task], task_manager=TaskManager(metadata=metadata), random_seed=seed, numpy_random_seed=seed,
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
