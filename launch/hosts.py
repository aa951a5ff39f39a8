"""What lies and runs on the hosts of a TPU: scripts beside the code, in ~/launch/NAME, and the commands that call them."""

from pathlib import Path

from launch import job
from launch.gcloud import Tpu


def scripts(line: str) -> dict[str, str]:
    """What lies beside the code on every host. So no command of ours is quoted twice on its way there."""
    # The images' Python is older than this project needs: uv brings one.
    setup = """#!/bin/bash
set -euo pipefail
cd "$(dirname "$0")"
python3 -m pip install --quiet --user uv
uv="python3 -m uv"
$uv venv --quiet --allow-existing --python 3.12 .venv
$uv pip install --quiet --python .venv/bin/python './code[tpu,gcs]'
"""
    start = """#!/bin/bash
cd "$(dirname "$0")"
if [[ -f pid && ! -f exit_code ]] && kill -0 "$(cat pid)" 2>/dev/null; then exit; fi
rm -f exit_code
nohup setsid ./job.sh >> job.log 2>&1 < /dev/null &
echo $! > pid
"""
    follow = """#!/bin/bash
cd "$(dirname "$0")"
exec tail -n "+$1" -F --pid="$(cat pid)" job.log
"""
    status = """#!/bin/bash
cd "$(dirname "$0")"
if [[ -f exit_code ]]; then state=$(cat exit_code)
elif kill -0 "$(cat pid)" 2>/dev/null; then state=running
else state=killed; fi
echo "job-state: $state"
echo "job-command: $(cat command)"
"""
    before = 'cd "$(dirname "$0")/code"\nsource ../.venv/bin/activate\nexport PYTHONUNBUFFERED=1\n'
    run = job.script(line, before, 'echo "$code" > ../exit_code\n')
    return {"setup.sh": setup, "job.sh": run, "start.sh": start, "follow.sh": follow, "status.sh": status, "command": line + "\n"}


def set_up(tpu: Tpu, bundle: Path) -> list[list[str]]:
    folder = f"launch/{tpu.name}"
    unpack = f"mkdir -p {folder} && tar -xzf {tpu.name}.tar.gz -C {folder} && bash {folder}/setup.sh"
    return [tpu.copy(str(bundle), f"{tpu.name}.tar.gz"), tpu.on_all(unpack), tpu.on_all(f"bash {folder}/start.sh")]


def logs(tpu: Tpu, first_line: int = 1) -> list[str]:
    return tpu.on_first(f"bash launch/{tpu.name}/follow.sh {first_line}")


def status(tpu: Tpu) -> list[str]:
    return tpu.on_all(f"bash launch/{tpu.name}/status.sh")
