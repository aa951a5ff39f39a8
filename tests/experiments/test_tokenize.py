"""`python -m experiments.tokenize` as it is run: its output, its errors, and kill -9 at any moment."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybrid_jax.data import DataError
from hybrid_jax.data.build import build_store
from hybrid_jax.data.sources import make_sources
from tests.hybrid_jax.data_samples import bpe_tokenizer, documents_of, texts, write_jsonl, write_texts

ROOT = Path(__file__).parents[2]


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.tokenize", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments) -> tuple[int, str, str]:
    process = start(*arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def content(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_from_files_to_the_command_that_trains(tmp_path):
    write_texts(tmp_path / "in", texts(50))
    write_jsonl(tmp_path / "more.jsonl.zst", texts(50, seed=1), field="body")
    (tmp_path / "tokenizer.json").write_bytes(bpe_tokenizer(["<stop>"]))
    flags = ("--text_field=body", f"--tokenizer={tmp_path}", "--document_end=<stop>", "--validation_fraction=0.2", "--workers=2")
    code, out, err = run(f"--input={tmp_path}/in/*.txt", f"--input={tmp_path}/more.jsonl.zst", f"--output={tmp_path}/store", *flags)
    assert code == 0, err
    sources = make_sources(str(tmp_path / "store"))
    assert sorted(text for source in sources for text in documents_of(source)) == sorted(texts(50) + texts(50, seed=1))
    for name, source in zip(("train", "validation"), sources, strict=True):
        assert f"{name}: {len(source.documents):,} documents, {len(source):,} tokens, {source.bytes:,} bytes of text\n" in out
    assert re.search(rf"store is finished \(\d+ s\): tokenizer {tmp_path}/tokenizer.json, vocabulary", out)
    assert f"train on it: python -m experiments.train --config=configs/gla_r6.py:tiny --config.data.source={tmp_path}/store\n" in out
    assert "tokenizing: 100.0% of" in err and "writing the store: 100.0% of" in err and "\r" not in err  # a log, not a bar


def test_one_document_is_no_store_to_train_on(tmp_path):
    (tmp_path / "all.txt").write_text("All there is, in one file. " * 50)
    code, out, err = run(f"--input={tmp_path}/all.txt", f"--output={tmp_path}/store")
    assert code == 0, err
    remedy = "a single document, and needs one to train on and one held out at least: make several of it, one a .txt file or a line"
    assert f"it cannot be trained on as it is: it has {remedy}" in out and "train on it:" not in out
    with pytest.raises(DataError, match=f"store has {remedy}") as error:
        make_sources(str(tmp_path / "store"))
    assert "--validation_fraction" not in str(error.value)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to CPUs")
def test_no_more_workers_than_cpus_that_may_be_used():
    bind = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])"
    count = "from experiments import tokenize; print(tokenize.usable_cpus())"
    assert subprocess.run([sys.executable, "-c", f"{bind}; {count}"], cwd=ROOT, capture_output=True, text=True).stdout == "1\n"


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_moment(tmp_path, seed):
    """kill -9 again and again: the store is the one of an undisturbed run, byte for byte, and no worker lives on."""
    rng = random.Random(seed)
    documents = texts(600, seed)
    for i in range(60):
        write_jsonl(tmp_path / "in" / f"{i:02d}.jsonl", documents[10 * i : 10 * i + 10])
    (tmp_path / "tokenizer.json").write_bytes(bpe_tokenizer(["</s>"]))
    flags = (f"--input={tmp_path}/in", f"--tokenizer={tmp_path}", "--validation_fraction=0.1")
    output, parts = tmp_path / "store", tmp_path / "store" / "parts"

    def finished_parts():
        return len(list(parts.glob("records/*.json")))

    kills = 0
    for _ in range(6):
        process, wanted = start(*flags, f"--output={output}", "--workers=2"), finished_parts() + rng.randrange(0, 15)
        while process.poll() is None and finished_parts() < wanted:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.01)
        try:
            workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        except FileNotFoundError:
            workers = []
        process.send_signal(signal.SIGKILL)
        kills += process.wait(timeout=60) == -signal.SIGKILL
        deadline = time.monotonic() + 20
        while any(map(alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(map(alive, workers))
        process.communicate()
    assert kills >= 3
    code, _, err = run(*flags, f"--output={output}", "--workers=2")
    assert code == 0, err
    assert run(*flags, f"--output={tmp_path}/undisturbed", "--workers=1")[0] == 0
    assert content(output) == content(tmp_path / "undisturbed")
    assert sorted(text for source in make_sources(str(output)) for text in documents_of(source)) == sorted(documents)


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_shards_killed_and_twice_at_once(tmp_path, gcs, where):
    """Two shards, one of them in two places, all killed and run again: the store of one undisturbed command, byte for byte."""
    base = str(tmp_path) if where == "disk" else f"gs://{gcs.new_bucket()}"
    documents = texts(600)
    for i in range(30):
        write_jsonl(tmp_path / "in" / f"{i:02d}.jsonl", documents[20 * i : 20 * i + 20])
        if where == "bucket":
            gcs.put(f"{base}/in/{i:02d}.jsonl", (tmp_path / "in" / f"{i:02d}.jsonl").read_bytes())

    def files(folder):
        return content(tmp_path / folder) if where == "disk" else gcs.files(f"{base}/{folder}")

    def start_all():
        flags = (f"--input={base}/in/*.jsonl", f"--output={base}/store", "--validation_fraction=0.1", "--workers=1")
        return [start(*flags, f"--shard={shard}") for shard in ("0/2", "1/2", "1/2")]

    shards = start_all()
    while sum(name.startswith("parts/records/") for name in files("store")) < 4 and any(shard.poll() is None for shard in shards):
        time.sleep(0.01)
    for shard in shards:
        shard.kill()
        shard.communicate()
    assert b'"complete": false' in files("store")["manifest.json"]
    results = [(shard.wait(timeout=120), *shard.communicate()) for shard in start_all()]
    assert [code for code, _, _ in results] == [0, 0, 0], results
    finished = [f"--config.data.source={base}/store\n" in out for _, out, _ in results]
    waiting = ["run without --shard" in out and "not there yet: " in out for _, out, _ in results]
    assert any(finished) and [not state for state in finished] == waiting
    build_store([f"{base}/in/*.jsonl"], f"{base}/undisturbed", validation_fraction=0.1)
    assert files("store") == files("undisturbed")
    assert sorted(text for source in make_sources(f"{base}/store") for text in documents_of(source)) == sorted(documents)


def test_ctrl_c_says_how_to_go_on(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", texts(3000) * 40)
    process = start(f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/store", "--workers=1")
    while process.poll() is None and not (tmp_path / "store" / "manifest.json").exists():
        time.sleep(0.001)
    time.sleep(1)  # its worker is at it
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.endswith("stopped: run the same command again to go on\n") and "Traceback" not in err


def test_errors_are_one_line(tmp_path):
    write_texts(tmp_path / "in", texts(5))
    write_jsonl(tmp_path / "bad.jsonl", texts(5))
    with open(tmp_path / "bad.jsonl", "a") as stream:
        stream.write('{"text": \n')
    (tmp_path / "file").touch()
    for match, *flags in (
        ("bad.jsonl, line 6: not JSON", f"--input={tmp_path}/bad.jsonl", f"--output={tmp_path}/a"),
        ("no text under 'body', it has 'id', 'text'", f"--input={tmp_path}/bad.jsonl", f"--output={tmp_path}/b", "--text_field=body"),
        ("names no file", f"--input={tmp_path}/none", f"--output={tmp_path}/c"),
        ("file is a file: give a folder", f"--input={tmp_path}/in", f"--output={tmp_path}/file"),
        ("no tokenizer at", f"--input={tmp_path}/in", f"--output={tmp_path}/d", "--tokenizer=nowhere"),
        ("--shard=3/3: give i/n, of n shards the i-th from 0", f"--input={tmp_path}/in", f"--output={tmp_path}/d", "--shard=3/3"),
        ("--shard=a/b: give i/n", f"--input={tmp_path}/in", f"--output={tmp_path}/d", "--shard=a/b"),
    ):
        code, out, err = run(*flags, "--workers=1")
        assert code == 2 and out == "" and match in err.splitlines()[-1] and "Traceback" not in err, err
        assert [line for line in err.splitlines() if not line.startswith("tokenizing: ")] == [err.splitlines()[-1]]
    code, _, err = run(f"--output={tmp_path}/e")
    assert code == 2 and err == "error: give the text and the folder of the store, such as --input='my_texts/*.txt' --output=my_store\n"
    code, _, err = run(f"--input={tmp_path}/in", "more.txt", f"--output={tmp_path}/e")
    assert code == 2 and "unexpected 'more.txt'; values are given as --name=value" in err and "globs quoted" in err


def test_standard_tokenize_stays_in_reach():
    """The command has the name of a module of the standard library, and must not stand in its way."""
    code = "import experiments.tokenize, os, tokenize; assert os.path.dirname(tokenize.__file__) == os.path.dirname(os.__file__)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
