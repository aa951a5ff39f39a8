"""Language-modelling benchmarks by lm-evaluation-harness (`lm_eval`), in this process: no server, no torch, no files in between.

`HarnessModel` answers the harness's three kinds of requests; what it answers is what the harness's own `HFLM` would, of the
same weights and the same ids. `evaluate` runs tasks: the harness's own by name, or a folder of task files.
"""

import functools
import importlib.metadata
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hybrid_jax.config.errors import meant
from hybrid_jax.data import DataError
from hybrid_jax.evals.benchmark_data import MissingFiles, read_locally
from hybrid_jax.evals.likelihood import log_likelihoods
from hybrid_jax.evals.writing import write
from hybrid_jax.model import Model
from hybrid_jax.sampling import sampling

# The study's tasks, and of each the metric that its average is of.
STUDY = {
    "arc_challenge": "acc_norm",
    "arc_easy": "acc",
    "hellaswag": "acc_norm",
    "lambada_openai": "acc",
    "openbookqa": "acc_norm",
    "piqa": "acc",
}
MAX_NEW_TOKENS = 256  # where a task does not say
GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p")
BOOTSTRAPS = 1000  # draws for the error of a metric that has no formula, such as perplexity


def evaluate(
    model: Model,
    tasks: Sequence[str] = tuple(STUDY),
    *,
    data: str | os.PathLike | None = None,
    include_path: str | os.PathLike | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    max_length: int = 2048,
    batch: int = 8,
    beginning: int | None = None,
    download: bool = False,
) -> dict[str, Any]:
    """Run ``tasks`` of the harness, zero-shot unless they or ``num_fewshot`` say otherwise.

    tasks: names the harness knows (tasks, groups, tags), or those of files in ``include_path``, a folder.
    data: the folder of the data sets that tasks name, laid out as `benchmark_data` says.
    download: let the harness fetch data sets over the network, as it does by itself; else only files that are here are read.
    limit: how many documents of each task are used; None: all.
    max_length, batch: see `likelihood.log_likelihoods`.
    beginning: see `HarnessModel`.

    Returns, ready for JSON, {"settings", "scores", "average"}: of each task its metrics, their standard errors, its version and how
    many documents it was. The average is the study's, over its six tasks by the metrics of `STUDY`; None where one was not run.

    Raises DataError, before anything is computed, for unknown tasks and for missing files, all of them at once.
    """
    lm = HarnessModel(model, max_length=max_length, batch=batch, beginning=beginning)
    manager = _manager(tasks, include_path)
    loaded = _load(manager, tasks, nullcontext() if download else read_locally(data, num_fewshot))
    # The harness would fork for its bootstraps, and a process that runs JAX must not be forked.
    with mock.patch.dict(os.environ, DISABLE_MULTIPROC="1"):
        results = simple_evaluate(
            lm,
            tasks=loaded,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
            task_manager=manager,
        )
    scores = {
        task: {
            "version": results["versions"].get(task),
            "num_fewshot": results["n-shot"].get(task),
            "documents": results["n-samples"][task]["effective"] if task in results["n-samples"] else None,
            **_metrics(found),
        }
        for task, found in results["results"].items()
    }
    settings = {
        "tasks": list(tasks),
        "num_fewshot": num_fewshot,
        "limit": limit,
        "max_length": max_length,
        "beginning": beginning,
        "lm_eval": importlib.metadata.version("lm_eval"),
    }
    return {"settings": settings, "scores": scores, "average": study_average(scores)}


def study_average(scores: dict[str, dict[str, Any]]) -> float | None:
    """The mean of the six tasks' scores by the metrics of `STUDY`; None where one is missing."""
    if not STUDY.keys() <= scores.keys():
        return None
    return sum(scores[task][metric] for task, metric in STUDY.items()) / len(STUDY)


class HarnessModel(TemplateLM):
    """A model as the harness asks it.

    max_length, batch: see `likelihood.log_likelihoods`; prompts to be written on are cut on the left to leave room for what is written.
    beginning: a token that stands before every text, which the tokenizers of Llama and Mistral put there in Hugging Face's
        libraries (1, `<s>`). None: none, and what has no context follows the end of a document.

    A run of several processes is one model to the harness: each process asks all requests, and gets all answers.
    """

    def __init__(self, model: Model, *, max_length: int = 2048, batch: int = 8, beginning: int | None = None):
        super().__init__()
        if model.tokenizer is None:
            raise ValueError("the model has no tokenizer, and the harness asks in texts: set model.tokenizer")
        self.model, self.max_length, self.batch, self.beginning = model, max_length, batch, beginning

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.document_end

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.beginning is None else self.beginning

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        tokens = self.model.tokenizer.encode(string)
        return tokens if self.beginning is None or add_special_tokens is False else [self.beginning, *tokens]

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        pairs = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        found = log_likelihoods(self.model, pairs, max_length=self.max_length, batch=self.batch)
        for (texts, *_), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, tuple(answer))
        return [tuple(answer) for answer in found]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for owner, (text,) in enumerate(request.args for request in requests):
            for window in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_probability, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += log_probability
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            options = _generation(requests[numbers[0]].args[1])
            room = self.max_length - options["max_new_tokens"]
            if room < 1:
                raise ValueError(f"{options['max_new_tokens']} new tokens leave no room for a prompt: max_length is {self.max_length}")
            contexts = [requests[number].args[0] for number in numbers]
            prompts = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts]
            for number, text in zip(numbers, write(self.model, prompts, batch=self.batch, **options), strict=True):
                texts[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return texts


def _generation(options: dict[str, Any]) -> dict[str, Any]:
    """The harness's options of a generation as those of `writing.write`. Raises ValueError for one it does not know."""
    options = normalize_gen_kwargs(options, MAX_NEW_TOKENS)
    unknown = sorted(options.keys() - set(GENERATION))
    if unknown:
        raise ValueError(f"a task asks for {', '.join(unknown)} in its generation_kwargs; there are {', '.join(GENERATION)}")
    filters = {name: options[name] for name in ("top_k", "top_p", "min_p") if options.get(name)}
    temperature = options.get("temperature", 1.0) if options["do_sample"] else 0.0
    return {
        "max_new_tokens": options["max_gen_toks"],
        "settings": sampling(temperature, **filters),
        "stop": [stop for stop in options["until"] if stop],
    }


_harness_tasks = functools.cache(TaskManager)  # which reads some ten thousand files


def _manager(names: Sequence[str], include_path: str | os.PathLike | None) -> TaskManager:
    """What knows the tasks ``names``, if anything does."""
    if include_path is None:
        return _harness_tasks()
    own = TaskManager(include_path=include_path, include_defaults=False)
    return own if set(names) <= set(own.all_tasks) else TaskManager(include_path=include_path)


def _load(manager: TaskManager, names: Sequence[str], reading: AbstractContextManager) -> list[Task | Group]:
    """The tasks and groups of ``names``, with their data, which are read in the context ``reading``."""
    known = set(manager.all_tasks)
    if unknown := [name for name in names if name not in known]:
        raise DataError(f"lm_eval knows no task {unknown[0]!r}; {meant(unknown[0], known, 'its list: lm-eval ls tasks')}")
    loaded, missing = [], []
    for name in names:
        try:
            with reading:
                found = manager.load(name)
        except MissingFiles as error:
            missing.append(str(error))
        else:
            loaded += [found["groups"][name]] if name in found["groups"] else found["tasks"].values()
    if missing:
        raise DataError(f"data sets are missing: {'; '.join(missing)}: put them there, or let lm_eval fetch them (--download)")
    return loaded


def _metrics(found: dict[str, Any]) -> dict[str, float | None]:
    """A task's numbers, named "acc" for the harness's "acc,none"."""
    numbers = {name.removesuffix(",none"): value for name, value in found.items() if "," in name}
    return {name: float(value) if _is_finite(value) else None for name, value in numbers.items()}


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
