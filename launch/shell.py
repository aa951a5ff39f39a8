"""Running other programs' commands, or only printing them."""

import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence

from hybrid_jax.config import ConfigError
from hybrid_jax.train.workdir import RunError

WHERE = {
    "gcloud": "install it from https://cloud.google.com/sdk/docs/install",
    "xpk": "pip install xpk, https://github.com/AI-Hypercomputer/xpk",
    "kubectl": "gcloud components install kubectl",
    "docker": "xpk builds the image with it: https://docs.docker.com/engine/install",
    "sbatch": "run this on a login node of the SLURM cluster",
}


def need(*tools: str) -> None:
    """Raises ConfigError for the first of ``tools`` that is not on PATH."""
    for tool in tools:
        if shutil.which(tool) is None:
            raise ConfigError(f"{tool} is not on PATH: {WHERE[tool]}")


def show(command: Sequence[str], stdin: str | None = None) -> None:
    """Print ``command`` as it could be typed."""
    print(shlex.join(command) + ("" if stdin is None else f" <<'END'\n{stdin.rstrip()}\nEND"), flush=True)


def ask(command: Sequence[str]) -> subprocess.CompletedProcess:
    """Run ``command`` silently, for what it prints."""
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def do(command: Sequence[str], failed: str, stdin: str | None = None) -> str:
    """Print and run ``command``, and return what it printed. Raises RunError, which begins with ``failed``, if it fails."""
    show(command)
    keywords = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    result = subprocess.run(command, capture_output=True, text=True, **keywords)
    if result.returncode:
        raise RunError(f"{failed}: {reason(result)}")
    return result.stdout


def stream(command: Sequence[str], line: Callable[[str], None] = lambda text: print(text, flush=True)) -> int:
    """Run ``command`` with every line that it prints given to ``line`` as it comes; its exit code."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, errors="replace") as process:
        try:
            for text in process.stdout:
                line(text.rstrip("\n"))
        except KeyboardInterrupt:
            process.terminate()
            raise
    return process.returncode


def reason(result: subprocess.CompletedProcess) -> str:
    """What a failed command said: its error if it names one, else its last lines; and what to do, where that is known."""
    said = (result.stderr or "").strip() or (result.stdout or "").strip() or f"exit code {result.returncode}"
    said = said[said.index("ERROR:") :] if "ERROR:" in said else said[-500:]
    for sign, hint in HINTS.items():
        if sign in said:
            return f"{said} ({hint})"
    return said


HINTS = {
    "RESOURCE_EXHAUSTED": "no quota for it: https://docs.cloud.google.com/tpu/docs/quota tells how to ask for more",
    "Quota": "ask for more quota: https://docs.cloud.google.com/tpu/docs/quota",
    "PERMISSION_DENIED": "your account needs roles/tpu.admin, and the project the TPU API: gcloud services enable tpu.googleapis.com",
    "Reauthentication": "gcloud auth login",
    "do not currently have an active account": "gcloud auth login",
    'no matches for kind "JobSet"': "install its controller: https://jobset.sigs.k8s.io/docs/installation",
    "(AlreadyExists)": "give another --name, or kubectl delete that one first",
    'error: context "': "gcloud container clusters get-credentials CLUSTER --location=LOCATION makes it",
    "required property [project]": "give --project, or gcloud config set project PROJECT",
}
