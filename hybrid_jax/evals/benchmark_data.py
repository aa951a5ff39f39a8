"""The data sets of benchmark tasks, from files that are here already:

    DATA/allenai__ai2_arc/ARC-Easy/test.parquet          DATA/<data set>/<configuration>/<split>.parquet
    DATA/Rowan__hellaswag/data/validation.jsonl          the configuration of one that has none is "data"

A data set's name has "__" for its "/". A split may come in parts, `test-00000-of-00002.parquet` and so on. Many data sets lie so on
the Hugging Face hub: a copy of one of these, under its name, will do.
"""

import json
import os
from pathlib import Path
from unittest import mock

import datasets
import pyarrow
import pyarrow.parquet
from lm_eval.api.task import ConfigurableTask

from hybrid_jax.data import DataError
from hybrid_jax.data.documents import readable_parquet

PACKAGED = ("json", "csv", "parquet", "text", "arrow", "pandas")  # what a task names whose `data_files` say where its data are


class MissingFiles(DataError):
    """Which file a task needs, and where it comes from."""


class Splits:
    """The splits of a task's data set, each read when it is asked for. Few-shot examples that nobody wants are not read: none."""

    def __init__(self, task: ConfigurableTask, data: str | os.PathLike | None, num_fewshot: int | None):
        config = task.config
        self.task, self.name = config.task, task.DATASET_PATH
        self.folder = Path(data or "DATA") / self.name.replace("/", "__") / (task.DATASET_NAME or "data")
        self.evaluated = config.test_split or config.validation_split  # None: the task is a program and does not say
        zero_shot = config.num_fewshot == 0 or not (num_fewshot if num_fewshot is not None else config.num_fewshot)
        self.others = not zero_shot or self.evaluated is None

    def __getitem__(self, split: str) -> datasets.Dataset:
        if split != self.evaluated and not self.others:
            return self[self.evaluated].select([])
        for suffix, read in ((".parquet", _parquet), (".jsonl", _jsonl)):
            if files := [*self.folder.glob(split + suffix), *sorted(self.folder.glob(f"{split}-*{suffix}"))]:
                return datasets.Dataset(pyarrow.concat_tables([read(file) for file in files]))
        page = f"https://huggingface.co/datasets/{self.name}"
        raise MissingFiles(f"{self.task} needs {self.folder / split}.parquet or .jsonl, from {page}")


def read_locally(data: str | os.PathLike | None, num_fewshot: int | None):
    """A context in which tasks are made with the data in the folder ``data``, and nothing is fetched. Raises MissingFiles in it.

    num_fewshot: what will be asked for in place of the tasks' own numbers; None: nothing.
    """
    fetch = ConfigurableTask.download

    def download(task: ConfigurableTask, dataset_kwargs: dict | None = None, **options) -> None:
        if task.DATASET_PATH in PACKAGED or task.config.custom_dataset:
            fetch(task, dataset_kwargs, **options)
        else:
            task.dataset = Splits(task, data, num_fewshot)

    return mock.patch.object(ConfigurableTask, "download", download)


def _parquet(file: Path) -> pyarrow.Table:
    with readable_parquet(file):
        return pyarrow.parquet.read_table(file)


def _jsonl(file: Path) -> pyarrow.Table:
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{file}, line {number}: not JSON ({error}): get the file again") from None
    try:
        return pyarrow.Table.from_pylist(rows)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, AttributeError) as error:
        raise DataError(f"{file}: its lines are not objects of one kind ({error})") from None
