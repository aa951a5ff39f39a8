"""The life of a job on TPU VMs: machines asked for, set up, followed, asked for again when they are taken away, and deleted.

A queued resource goes from WAITING_FOR_RESOURCES over PROVISIONING to ACTIVE, and to SUSPENDED when it is preempted, from where it does
not come back: it is deleted and created anew (https://docs.cloud.google.com/tpu/docs/queued-resources).
"""

import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from experiments import cli
from hybrid_jax.amounts import count
from hybrid_jax.config import ConfigError
from hybrid_jax.train.workdir import RunError
from launch import hosts, shell
from launch.gcloud import Tpu

POLL_SECONDS = 20.0
PAUSE_POLLS = 15  # polls' time until what Google Cloud refused is asked for again
GRACE_SECONDS = 180.0  # from the first sign of trouble on a host until its machine is sure to be known as taken away
DELETED = (None, "DELETING")  # by a person: a preempted resource stays there, suspended
GONE = (*DELETED, "SUSPENDING", "SUSPENDED", "FAILED")
STOPPED = str(cli.STOPPED)


class Plan(NamedTuple):
    tpu: Tpu
    create: list[str]  # the command
    line: str  # the job's command
    bundle: Path  # code and scripts
    hosts: int


# ---------------------------------------------------------------- what is known of them


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def state(tpu: Tpu) -> str | None:
    """Of the queued resource; None if there is none. Raises RunError if Google Cloud does not answer."""
    for _ in range(5):
        described = shell.ask(tpu.state())
        if described.returncode == 0:
            return described.stdout.strip()
        if "NOT_FOUND" in described.stderr:
            return None
        time.sleep(POLL_SECONDS)
    raise RunError(f"Google Cloud does not say how {tpu.name} is: {shell.reason(described)}")


class HostStates(NamedTuple):
    states: list[str]  # of the hosts that answered: "running", "killed" or an exit code
    commands: set[str]


def host_states(tpu: Tpu) -> HostStates:
    answered = shell.ask(hosts.status(tpu)).stdout
    return HostStates(re.findall(r"^job-state: (\S+)$", answered, re.M), set(re.findall(r"^job-command: (.*)$", answered, re.M)))


# ---------------------------------------------------------------- the life of a job


def run(plan: Plan) -> int:
    """Have the job done, whatever happens to the machines; the exit code."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _live(plan)
    except KeyboardInterrupt:
        return _interrupted(plan.tpu)
    except Exception as error:
        if not isinstance(error, (Over, ConfigError)):
            print(still_there(plan.tpu), file=sys.stderr, flush=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _live(plan: Plan) -> int:
    tpu = plan.tpu
    if known := state(tpu):
        say(f"{tpu.name} is there already ({known}): going on with it")
    else:
        _create(plan)
    had = False  # whether there were machines: what is refused at first is a mistake, and later bad luck
    while True:
        if not _await_active(plan, had):
            _recreate(plan)
            continue
        had = True
        if not known or not _under_way(plan):
            _set_up(plan)
        known = None
        ended = _follow(plan)
        if ended == "lost":
            if state(tpu) in DELETED:
                raise Over(
                    f"{tpu.name} was deleted from elsewhere. The same command goes on from the job's last checkpoint, on new machines"
                )
            say(f"{tpu.name} was taken away; the job goes on from its last checkpoint on new machines")
            _recreate(plan)
            continue
        if ended == "failed":
            say("the job failed; the end of each host's log:")
            shell.stream(tpu.on_all(f"tail -n 30 launch/{tpu.name}/job.log"))
        _delete(tpu)
        if ended == "failed":
            raise Over("the job failed (its log is above); the machines are deleted. The same command goes on from its last checkpoint")
        say("done; the machines are deleted")
        return 0


class Over(RunError):
    """A failure that has left nothing behind."""


def _create(plan: Plan, times: int = 1) -> None:
    def create() -> None:
        try:
            shell.do(plan.create, f"Google Cloud did not create {plan.tpu.name}")
        except RunError as error:
            if state(plan.tpu) is None:  # it may be there all the same
                raise Over(f"{error}; nothing is left of it") from None

    _patiently(create, times)


def _recreate(plan: Plan) -> None:
    if state(plan.tpu) is not None:
        _delete(plan.tpu)
    _create(plan, times=5)


def _await_active(plan: Plan, again: bool) -> bool:
    """Wait for the machines; False if they were taken away first, or, asked for ``again``, cannot be had now.

    Raises RunError where they cannot be had the first time.
    """
    shown = ""
    while (now := state(plan.tpu)) != "ACTIVE":
        if now == "FAILED":
            why = shell.ask(plan.tpu.why_failed()).stdout.strip() or "no reason was given"
            if again:
                say(f"{plan.tpu.name} cannot be had: {why}; asking again in a while. Ctrl-C to stop asking")
                time.sleep(PAUSE_POLLS * POLL_SECONDS)
                return False
            _delete(plan.tpu)
            raise Over(f"{plan.tpu.name} cannot be had: {why}; the request is deleted")
        if now in DELETED:
            raise Over(f"{plan.tpu.name} was deleted from elsewhere")
        if now in GONE:
            return False
        if now != shown:
            say(f"{plan.tpu.name}: {now}. Ctrl-C to stop waiting")
        shown = now
        time.sleep(POLL_SECONDS)
    say(f"{plan.tpu.name}: ACTIVE")
    return True


def _under_way(plan: Plan) -> bool:
    """Whether this job was started on machines that were there before. Raises ConfigError if another one was."""
    found = host_states(plan.tpu)
    if found.commands - {plan.line}:
        other = (found.commands - {plan.line}).pop()
        raise ConfigError(f"{plan.tpu.name} runs another command ({other}): give another --name, or first {plan.tpu.typed('delete')}")
    return len(found.states) == plan.hosts and all(each in ("running", "0") for each in found.states)


def _set_up(plan: Plan) -> None:
    copy, install, start = hosts.set_up(plan.tpu, plan.bundle)
    say("copying the code, installing it, starting the command on every host")
    try:
        _patiently(lambda: shell.do(copy, "the code could not be copied to the machines"))  # they take a while to answer
        _patiently(lambda: shell.do(install, "the code could not be installed on the machines"))
        _patiently(lambda: shell.do(start, "the command could not be started on the machines"))
    except RunError as error:
        if state(plan.tpu) in GONE:
            return  # which following it will notice
        _delete(plan.tpu)
        raise Over(f"{error}; the machines are deleted") from None


def _patiently(action: Callable[[], object], times: int = 3) -> None:
    for attempt in range(1, times + 1):
        try:
            action()
            return
        except RunError:
            if attempt == times:
                raise
            time.sleep(POLL_SECONDS)


def _follow(plan: Plan) -> str:
    """Print the first host's log until the job has ended: "done", "failed", or "lost" with its machines."""
    shown = 0

    def line(text: str) -> None:
        nonlocal shown
        shown += 1
        print(text, flush=True)

    while True:
        shell.stream(hosts.logs(plan.tpu, shown + 1), line)
        found = host_states(plan.tpu).states
        if found == ["0"] * plan.hosts:
            return "done"
        if len(found) == plan.hosts and set(found) <= {"running", "0"}:
            time.sleep(POLL_SECONDS)  # the connection broke, or the other hosts have not finished yet
            continue
        if len(found) == plan.hosts and set(found) <= {"1", "2"}:
            return "failed"  # the trainer said so on every host, which machines that go do not do
        if _taken_away(plan.tpu):
            return "lost"
        found = host_states(plan.tpu).states
        if set(found) - {"running", "0", STOPPED}:
            return "failed"
        if not found:
            say("the hosts do not answer, but are there: trying again")
        if STOPPED in found and "running" not in found:
            say("the job was asked to stop, but its machines are there: starting it again")
            shell.do(hosts.set_up(plan.tpu, plan.bundle)[2], "the command could not be started on the machines")


def _taken_away(tpu: Tpu) -> bool:
    """Whether the machines go, as they do a while after their hosts' first sign of trouble."""
    deadline = time.monotonic() + GRACE_SECONDS
    while True:
        if state(tpu) in GONE:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(min(POLL_SECONDS, GRACE_SECONDS))


# ---------------------------------------------------------------- the end


def _delete(tpu: Tpu) -> None:
    def delete() -> None:
        try:
            shell.do(tpu.delete(), f"{tpu.name} COULD NOT BE DELETED, and is paid for until it is")
        except RunError:
            if state(tpu) is not None:
                raise

    _patiently(delete)


def still_there(tpu: Tpu) -> str:
    """What is left running, and the commands for it; nothing is left without this being said."""
    return (
        f"{tpu.name} in {tpu.zone} may still be there, and is paid for until it is deleted.\n"
        f"  how it is:  {tpu.typed('status')}\n  follow it:  {tpu.typed('logs')}\n  delete it:  {tpu.typed('delete')}\n"
        "  the same command again goes on with it"
    )


def _interrupted(tpu: Tpu) -> int:
    try:
        if sys.stdin.isatty() and input(f"\nDelete {tpu.name} now, with the job on it? [y/N] ").strip().lower() in ("y", "yes"):
            _delete(tpu)
            say("deleted")
            return 130
    except (KeyboardInterrupt, EOFError):
        pass
    print(still_there(tpu), flush=True)
    return 130


# ---------------------------------------------------------------- the other commands


def status(tpu: Tpu) -> int:
    now = state(tpu)
    print(f"{tpu.name}: {now or 'there is none'}")
    if now == "ACTIVE":
        found = host_states(tpu)
        for each in sorted(set(found.states)):
            print(f"{count(found.states.count(each), 'host')}: {each if each in ('running', 'killed') else f'ended with exit code {each}'}")
        print("\n".join(sorted(found.commands)) or "nothing was started on it")
    return 0


def logs(tpu: Tpu) -> int:
    if (now := state(tpu)) != "ACTIVE":
        raise RunError(f"{tpu.name} has no log to follow: {now or 'there is no such resource'}")
    return shell.stream(hosts.logs(tpu))


def delete(tpu: Tpu) -> int:
    if state(tpu) is None:
        print(f"{tpu.name}: there is none in {tpu.zone}")
        return 0
    _delete(tpu)
    print(f"{tpu.name}: deleted")
    return 0
