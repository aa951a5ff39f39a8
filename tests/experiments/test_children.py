"""The processes that a command starts: signals are passed on, and what it prints is kept."""

import os
import signal
import threading
import time

import pytest

from experiments.children import Children

SLOW = """
import pathlib, signal, sys, time
def stop(*_):
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
pathlib.Path("ready").touch()
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def commands(tmp_path, monkeypatch):
    """A package `experiments` of commands that need no JAX."""
    package = tmp_path / "experiments"
    package.mkdir()
    for name, text in {"__init__": "", "slow": SLOW, "fails": "import sys; sys.exit(3)", "says": "import sys; print(sys.argv[1:])"}.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)


def test_what_of_the_environment_is_not_settled_is_told(tmp_path, monkeypatch):
    log = tmp_path / "log"
    (tmp_path / "experiments/tells.py").write_text("import os; print(os.environ['GIVEN'], 'PATH' in os.environ)")
    with Children({"GIVEN": "by the command"}) as children:
        assert children.run("tells", log=log)
        monkeypatch.setenv("GIVEN", "by a person")
        assert children.run("tells", log=log)
    assert log.read_text() == "by the command True\nby a person True\n"


def test_what_is_printed_is_added_to_the_log(tmp_path):
    log = tmp_path / "log"
    with Children() as children:
        assert children.run("says", "a b", log=log) and children.run("says", "c", log=log)
        assert not children.run("fails", log=log)
    assert log.read_text() == "['a b']\n['c']\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_and_what_runs_may_save(tmp_path, number, capfd):
    def send():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    outside = signal.signal(number, signal.SIG_DFL)  # which may be none, as under nohup
    with Children() as children:
        threading.Thread(target=send, daemon=True).start()
        assert children.run("slow", log=tmp_path / "log")
        assert children.stopped == signal.Signals(number).name
        assert not children.run("says", log=tmp_path / "log")  # nothing is started any more
    assert (tmp_path / "log").read_text() == "saved\n"
    assert signal.signal(number, outside) == signal.SIG_DFL
    assert f"{children.stopped}: what is running saves and stops" in capfd.readouterr().err


def test_an_ignored_signal_stays_ignored(monkeypatch):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Children() as children:
            os.kill(os.getpid(), signal.SIGHUP)
        assert children.stopped is None
    finally:
        signal.signal(signal.SIGHUP, before)
