"""What a run writes and shows: rows that survive a kill, numbers for people, advice, and the picture."""

import json
import re
import shutil
import struct
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import pyplot

import hybrid_jax.train.report
from hybrid_jax import costs
from hybrid_jax.amounts import count, duration, quantity
from hybrid_jax.config import ConfigError, LogConfig, to_dict
from hybrid_jax.data.mix import Mix
from hybrid_jax.data.token_source import ArraySource
from hybrid_jax.data.tokenizers import ByteTokenizer
from hybrid_jax.train import advice, plot, throughput
from hybrid_jax.train.metrics import Metrics, by_doubling, read_rows
from hybrid_jax.train.progress import Display
from hybrid_jax.train.report import Report
from hybrid_jax.train.step import StepMetrics
from hybrid_jax.train.workdir import RunError
from tests.hybrid_jax.train_runs import small_run

QUIET = small_run(log={"tensorboard": False})


def test_rows_are_written_as_json_lines(tmp_path):
    metrics, before = Metrics(tmp_path, QUIET, "run"), time.time()
    metrics.write(1, {"loss": 2.5, "loss_by_position": {"0": 3.0}})
    metrics.write(2, {"loss": float("nan"), "loss_by_position": {"0": float("inf")}})
    rows = read_rows(tmp_path / "metrics.jsonl")  # readable at once, by whoever follows the file
    assert all(before - 1 < row.pop("time") < time.time() + 1 for row in rows)
    assert rows == [
        {"step": 1, "loss": 2.5, "loss_by_position": {"0": 3.0}},
        {"step": 2, "loss": None, "loss_by_position": {"0": None}},
    ]
    metrics.close()


def test_a_run_that_goes_on_drops_the_rows_after_its_checkpoint(tmp_path):
    metrics = Metrics(tmp_path, QUIET, "run")
    for step in range(1, 6):
        metrics.write(step, {"loss": 1.0 * step})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut short by a kill
    metrics = Metrics(tmp_path, QUIET, "run", start_step=3)
    metrics.write(4, {"loss": 40.0})
    metrics.close()
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path / "metrics.jsonl")] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_tensorboard_gets_every_scalar(tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    metrics = Metrics(tmp_path, small_run(), "run", start_step=2)
    metrics.write(3, {"loss": 2.5, "grad_norm": float("nan"), "evaluation": {"loss": 2.0, "tokens": 64}})
    metrics.close()
    (file,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    content, events = file.read_bytes(), []
    while content:  # a record: its length, a checksum of that, the event, a checksum of that
        (length,) = struct.unpack("<Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    version, start, row = events
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (3, SessionLog.START)
    assert row.step == 3
    assert {value.tag: value.simple_value for value in row.summary.value} == {"loss": 2.5, "evaluation/loss": 2.0, "evaluation/tokens": 64}


def test_wandb_gets_every_scalar_and_the_same_run_again(tmp_path, monkeypatch):
    started, logged, config = [], [], small_run(log={"tensorboard": False, "wandb_project": "hybrid"})
    run = SimpleNamespace(log=lambda row, step: logged.append((step, row)), finish=lambda: logged.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: started.append(options) or run))
    for step in (1, 2):
        metrics = Metrics(tmp_path, config, "run", step - 1)
        metrics.write(step, {"loss": 1.0, "evaluation": {"loss": 2.0}})
        metrics.close()
    assert logged == [(1, {"loss": 1.0, "evaluation/loss": 2.0}), "finished", (2, {"loss": 1.0, "evaluation/loss": 2.0}), "finished"]
    assert started[0] == started[1] and started[0]["resume"] == "allow" and started[0]["config"] == to_dict(config)
    shutil.rmtree(tmp_path)  # what is made in its place is another run
    tmp_path.mkdir()
    Metrics(tmp_path, config, "run").close()
    assert len({options["id"] for options in started}) == 2


def test_wandb_that_is_not_installed_is_told_of(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    advice.check_logging(LogConfig())
    with pytest.raises(ConfigError, match="pip install"):
        advice.check_logging(LogConfig(wandb_project="hybrid"))


def test_a_platform_that_is_not_there_is_told_of():
    advice.check_platform("any")
    advice.check_platform("cpu")
    for platform in ("tpu", "gpu"):
        with pytest.raises(ConfigError, match=f"'{platform}' was asked for and JAX finds only 'cpu'.*pip install"):
            advice.check_platform(platform)


def test_positions_are_averaged_by_doubling():
    totals, weights = np.arange(10.0), np.ones(10)
    weights[0] = 0
    assert by_doubling(totals, weights) == {"1": 1.0, "2-3": 2.5, "4-7": 5.5, "8-9": 8.5}
    assert by_doubling(np.array([6.0, 0, 1, 1]), np.array([2.0, 1, 4, 0])) == {"0": 3.0, "1": 0.0, "2-3": 0.5}


# ---------------------------------------------------------------- what a person sees


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.4, "3 s"), (89, "89 s"), (600, "10 min"), (3600 * 3 + 1200, "3 h 20 min"), (86400 * 5 + 7200, "5 days 2 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(0.5, "0.5"), (950, "950"), (12345, "12.3k"), (4.56e6, "4.56M"), (2e10, "20B")])
def test_quantities(number, text):
    assert quantity(number) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 steps"), (1, "1 step"), (2, "2 steps"), (40000, "40,000 steps")])
def test_counts(number, text):
    assert count(number, "step") == text


def row(**changes):
    return {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 0.1, "tokens_per_second": 1e4, "mfu": 0.25, "skipped": 0, **changes}


def test_a_log_file_gets_plain_lines(capsys):
    display = Display(300, 0)
    display.doing("compiling")
    display.step(9, row(), 100.0, line=False)
    display.step(10, row(skipped=2), 3600.0, line=True)
    display.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["step  10/300  loss 2.0000  10k tokens/s  MFU 25.0%  60 min left  2 skipped  gradient 1  rate 0.1"]


@pytest.mark.parametrize("columns", ["120", "62"])
def test_a_terminal_gets_a_bar(capsys, monkeypatch, columns):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", columns)
    display = Display(300, 0)
    display.doing("compiling")
    time.sleep(0.3)  # shown by the bar's own thread, ten times a second
    assert "compiling" in capsys.readouterr().out
    display.step(150, row(), 100.0, line=False)
    display.say("a line that stays")
    display.close()
    shown = capsys.readouterr().out
    assert "150/300" in shown and "2 min left" in shown and "10k tokens/s" in shown and "a line that stays" in shown


def step_metrics(loss=2.0, skipped=0, in_a_row=0):
    scalars = (jnp.float32(loss), jnp.float32(1.0), jnp.float32(0.1), jnp.int32(skipped), jnp.int32(in_a_row))
    return StepMetrics(*scalars, 24.0 * jnp.ones(12), 8.0 * jnp.ones(12))


@pytest.fixture
def peak(monkeypatch):
    monkeypatch.setattr(throughput, "matmul_rate", lambda dtype, size: 1e9)


def test_a_report_logs_every_few_steps_and_counts_what_was_skipped(tmp_path, peak, capsys):
    run = small_run(train={"log_every": 2, "bad_steps": 2, "steps": 6}, log={"tensorboard": False})
    report = Report(run, tmp_path, "run", 0)
    for step, metrics in enumerate([step_metrics(), step_metrics(3.0), step_metrics(float("nan"), 1, 1), step_metrics(4.0, 1, 0)], 1):
        report.step(step, metrics)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"], row["skipped"]) for row in rows] == [(1, 2.0, 0), (2, 3.0, 0), (4, 4.0, 1)]
    assert rows[0]["tokens"] == 96 and rows[0]["loss_by_position"] == {"0": 3.0, "1": 3.0, "2-3": 3.0, "4-7": 3.0, "8-11": 3.0}
    for row in rows:
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] / 96 * throughput.training_flops(run) / 1e9)
    assert "step 3: the loss or its gradient is not finite; the step is skipped (1 in a row)" in capsys.readouterr().out
    report.step(5, step_metrics(float("inf"), 2, 1))
    with pytest.raises(RunError, match="stopped after step 6: .* 2 steps in a row .* still those of step 4.*learning_rate"):
        report.step(6, step_metrics(float("inf"), 3, 2))
    assert report.speed()["skipped"] == 3
    report.close()
    assert Report(run, tmp_path, "run", 6, skipped=3).speed()["skipped"] == 3  # with no step left to take


def test_a_reports_speed_is_of_the_steps_since_it_was_started_and_of_nothing_but_steps(tmp_path, peak, monkeypatch):
    """Of a run that goes on after step 100: two seconds a step, an evaluation of a thousand among them."""
    run = small_run(train={"steps": 110, "log_every": 50, "microbatch": 2}, log={"tensorboard": False})
    clock, left = [0.0], []
    monkeypatch.setattr(hybrid_jax.train.report, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    report = Report(run, tmp_path, "run", 100)
    monkeypatch.setattr(report.display, "step", lambda step, row, seconds_left, line: left.append((step, seconds_left, line)))
    for step in range(101, 111):
        clock[0] += 2.0
        report.step(step, step_metrics())
        if step == 105:
            clock[0] += 1000.0
            report.start_clock()
    speed = report.speed()
    report.close()
    assert speed["seconds"] == 1020 and speed["tokens_per_second"] == 96 / 2
    flops = 3 * 96 * costs.flops_per_token(run.model, 12)  # forward, and twice as much backward, of all tokens of a step
    assert speed["mfu"] == pytest.approx(flops / 2 / 1e9)
    assert left == [(step, pytest.approx(2.0 * (110 - step)), step == 110) for step in range(101, 111)]  # the last is logged
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert (row["step"], row["tokens"], row["tokens_per_second"]) == (110, 110 * 96, pytest.approx(48))


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        *(("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU7x", 2307e12 / 2)),
        *(("TPU v5p", 459e12), ("TPU v5e", 197e12), ("TPU v6 lite", 918e12), ("TPU v6e", 918e12)),
        *(("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA A100-PCIE-40GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12)),
        *(("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12)),
        *(("NVIDIA H200", 989e12), ("NVIDIA H200 NVL", 835e12), ("NVIDIA GH200 480GB", 989e12), ("NVIDIA GH200 144G HBM3e", 989e12)),
        *(("NVIDIA B200", 2250e12), ("NVIDIA GB200", 2500e12)),
    ],
)
def test_known_chips_have_their_data_sheets_rate(monkeypatch, kind, rate):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind, platform="tpu")])
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert throughput.peak_flops()[0] == 4 * rate == 4 * throughput.peak_flops(devices=1)[0]


@pytest.mark.parametrize(
    "kind", ["NVIDIA H20", "NVIDIA RTX A1000", "NVIDIA H800", "NVIDIA GB300", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "TPU v2", "TPU7"]
)
def test_what_is_only_called_like_a_known_chip_is_measured(monkeypatch, kind):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind, platform="gpu")])
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    monkeypatch.setattr(throughput, "matmul_rate", lambda dtype, size: 1e9)
    assert throughput.peak_flops() == (4e9, "its measured bfloat16 matmul rate")
    assert throughput.peak_flops(devices=1)[0] == 1e9


def test_other_devices_are_measured():
    rate, source = throughput.peak_flops()
    assert 1e8 < rate < 1e15 and "measured" in source


def test_a_matmul_is_two_flops_for_each_of_its_products(monkeypatch):
    """Over the best of five, by a clock that has it take 4, 3, 2, 3 and 4 seconds."""
    times = iter([0, 4, 10, 13, 20, 22, 30, 33, 40, 44])
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    assert throughput.matmul_rate(jnp.float32, 8) == 8 * 8 * (8 + 8) / 2


SHARED_KEYS = {"model": {"mixer": {"name": "attention", "heads": 2, "kv_heads": 1}}}
HGRN2_HYBRID = {
    "model": {"mixer": {"name": "hgrn2", "expand_ratio": 8}, "attention": {"heads": 2, "kv_heads": 1}, "layers": 2, "ratio": 2},
}


@pytest.mark.parametrize(
    ("changes", "tokens", "peak_rate", "expected"),
    [
        ({}, 10**6, 1e12, []),
        ({"model": {"vocabulary": 32000}}, 10**6, 1e12, ["THIS IS NOT THE STUDY'S DATA.*--config.data.source"]),
        ({}, 96, 1e12, ["reads its 96 tokens of text 20 times over"]),
        # three rows in four hold recall problems and no text
        ({"data": {"window": 12, "mqar": {"share": 0.75, "length": 12}}}, 96, 1e12, ["reads its 96 tokens of text 5 times over"]),
        ({"optimizer": {"warmup_steps": 20}}, 10**6, 1e12, ["never reaches its peak.*--config.optimizer.warmup_steps"]),
        ({"mesh": {"tensor": 4}}, 10**6, 1e12, ["mesh.tensor=4 does not divide the 2 heads of attention"]),
        ({"mesh": {"tensor": 2}}, 10**6, 1e12, []),
        (SHARED_KEYS | {"mesh": {"tensor": 2}}, 10**6, 1e12, ["mesh.tensor=2 does not divide the 1 head of attention"]),
        (HGRN2_HYBRID | {"mesh": {"tensor": 4}}, 10**6, 1e12, ["does not divide the 2 heads of hgrn2", "the 1 head of attention"]),
        ({}, 10**6, 1e3, ["ONE STEP WILL TAKE AT LEAST .*:tiny.*--config.train.batch=8 --config.data.window=12"]),
    ],
)
def test_advice_before_time_is_lost(changes, tokens, peak_rate, expected):
    text = ArraySource(np.zeros(tokens, np.uint16), [tokens], tokenizer=ByteTokenizer(), bytes=tokens, name="text")
    notes = advice.notes(small_run(**changes), text, peak_rate)
    assert len(notes) == len(expected)
    for note, pattern in zip(notes, expected, strict=True):
        assert re.search(pattern, note), note


def test_of_a_mix_each_part_is_read_as_often_as_its_share_says():
    """Of the 1,920 tokens of a run three quarters from 300, five times over, and a quarter from 200, which is not too often."""
    sizes = {"short": 300, "long": 200}
    parts = [ArraySource(np.zeros(n, np.uint16), [n], tokenizer=ByteTokenizer(), bytes=n, name=name) for name, n in sizes.items()]
    (note,) = advice.notes(small_run(), Mix(parts, [3, 1]), 1e12)
    assert note == "the run of 1.92k tokens reads its 300 tokens of short 5 times over"


def test_tokens_of_another_tokenizer_than_the_models_are_told_of():
    text = ArraySource(np.zeros(10**6, np.uint16), [10**6], tokenizer=ByteTokenizer(), bytes=10**6, name="STORE (train)")
    assert not advice.notes(small_run(), text, 1e12, ByteTokenizer())
    other = SimpleNamespace(name="WORKDIR/huggingface/tokenizer.json", fingerprint="another")
    (note,) = advice.notes(small_run(), text, 1e12, other)
    assert note.startswith("STORE (train) WAS TOKENIZED WITH A DIFFERENT TOKENIZER THAN")
    assert other.name in note and "--tokenizer=WORKDIR/huggingface" in note


# ---------------------------------------------------------------- the picture


def write_run(workdir, steps):
    """The files of a run that was watched for ``steps`` steps, with a skipped one and three evaluations."""
    with (workdir / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            loss = None if step == 3 else 1 + 4 / step
            print(json.dumps({"step": step, "loss": loss}), file=file)
            if steps >= 30 and step % (steps // 3) == 0:
                found = {"loss": 1.5, "bits_per_byte": 2.2, "xz_bits_per_byte": 2.0, "unigram_bits_per_byte": 4.7, "mqar_accuracy": 0.5}
                print(json.dumps({"step": step, "evaluation": found}), file=file)
                positions = {"step": step, "tokens": 64, "loss_by_position": [None, *(3.0 / np.arange(1, 64)).tolist()]}
                (workdir / f"eval-{step}.json").write_text(json.dumps(positions))


@pytest.mark.parametrize("steps", [0, 5, 60])
def test_a_picture_of_any_run(tmp_path, steps):
    write_run(tmp_path, steps)
    file = plot.plot_run(tmp_path)
    content = file.read_bytes()
    assert file == tmp_path / "summary.png" and content.startswith(b"\x89PNG") and len(content) > 20_000


def test_a_picture_names_the_model_and_the_folder(tmp_path):
    (workdir := tmp_path / "r1").mkdir()
    assert plot._title(workdir, [{"step": 5}], None) == "r1, 5 steps"
    assert plot._title(workdir, [{"step": 5}], "gla_r6-tiny") == "gla_r6-tiny (r1), 5 steps"
    assert plot._title(workdir, [{"step": 5}], "r1") == "r1, 5 steps"
    (workdir / "summary.json").write_text('{"run": "gla_r6-tiny"}')
    assert plot._title(workdir, [], None) == "gla_r6-tiny (r1), 0 steps"


def test_no_line_goes_through_the_last_value():
    found = {"xz_bits_per_byte": 2.0, "unigram_bits_per_byte": 4.7, "bits_per_byte": 4.5}
    figure, axes = pyplot.subplots(figsize=(5.5, 3.75))
    plot._bits(axes, [{"step": 5, "evaluation": found}])
    value = next(text for text in axes.texts if text.get_text() == "4.500")
    assert value.get_bbox_patch().get_facecolor() == (1, 1, 1, 1) and value.zorder > max(line.zorder for line in axes.lines)
    pyplot.close(figure)


@pytest.mark.parametrize("bits", [[8.1], [8.1, 3.0]])
@pytest.mark.parametrize("steps", [1, 10])
def test_axes_of_steps_are_whole_and_leave_room_for_the_last_value(bits, steps):
    found = {"xz_bits_per_byte": 2.0, "unigram_bits_per_byte": 4.7, "mqar_accuracy": 1.0, "loss": 1.0}
    rows = [{"step": steps * i, "evaluation": found | {"bits_per_byte": value}} for i, value in enumerate(bits, 1)]
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.75))
    plot._losses(axes[0], [{"step": step, "loss": 1.0} for step in range(1, steps + 1)], rows)
    plot._bits(axes[1], rows)
    plot._recall(axes[2], rows)
    figure.canvas.draw()
    for one in axes:
        ticks = [label.get_text() for label in one.get_xticklabels()]
        assert len(set(ticks)) == len(ticks) and all(tick == round(tick) for tick in one.get_xticks())
    for one in axes[1:]:
        label = next(text for text in one.texts if text.get_text() in (f"{bits[-1]:.3f}", "100.0%"))
        assert label.get_window_extent().y1 < one.get_window_extent().y1
    pyplot.close(figure)


def test_smoothing_leaves_gaps_out_and_looks_back_a_tenth():
    values = np.array([10.0, np.nan, *range(2, 40)])
    smooth = plot.smoothed(values)
    assert smooth[0] == 10 and np.isnan(smooth[1]) and smooth[5] == 5
    assert smooth[39] == np.mean(range(35, 40))


def test_positions_are_binned_on_a_log_scale():
    losses = np.arange(1.0, 17.0)
    losses[0] = np.nan
    places, means = plot.by_log_bins(losses, per_doubling=1)
    np.testing.assert_allclose(places, [2.5, 5.5, 11.5, 16])
    np.testing.assert_allclose(means, [2.5, 5.5, 11.5, 16])
