"""The checkout's code, as it is now, for other machines: what git tracks with the changes that are not committed yet, and nothing else."""

import fnmatch
import io
import shutil
import subprocess
import tarfile
from pathlib import Path

from experiments import cli
from hybrid_jax.config import ConfigError

SECRETS = (".env", ".env.*", "*.pem", "*.key", "*.p12", "id_rsa*", "id_ed25519*", ".netrc", "*credentials*.json", "*service*account*.json")


def root() -> Path:
    """The checkout that this package is run from. Raises ConfigError where it is not one."""
    folder = cli.PACKAGE.parent
    if shutil.which("git") is None:
        raise ConfigError("git is not on PATH: it says which files belong to the code that is copied to the machines")
    if subprocess.run(["git", "-C", folder, "rev-parse", "--git-dir"], capture_output=True).returncode:
        raise ConfigError(f"{folder} is not a git checkout, whose code could be copied: git clone the project, and run from there")
    return folder


def files(folder: Path) -> list[Path]:
    """What git tracks in ``folder`` and is there, relative to it. Raises ConfigError for a file that looks like a secret."""
    tracked = [Path(name) for name in _git(folder, "ls-files", "-z")]
    for path in tracked:
        if any(fnmatch.fnmatch(path.name.lower(), pattern) for pattern in SECRETS):
            raise ConfigError(f"{path} looks like a secret, and git tracks it: it would be copied to every machine. git rm --cached {path}")
    return sorted(path for path in tracked if (folder / path).is_file())


def note_left_behind(folder: Path) -> None:
    """Print which source files git neither tracks nor ignores: they are not copied."""
    names = sorted(name for name in _git(folder, "ls-files", "-z", "--others", "--exclude-standard") if name.endswith(".py"))
    if names:
        print(f"note: not copied, for git does not track them: {', '.join(names)}; git add what the job needs")


def _git(folder: Path, *arguments: str) -> list[str]:
    output = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True).stdout
    return [name for name in output.split("\0") if name]


def check_config(folder: Path, given: str | None) -> None:
    """Raises ConfigError where the file of ``--config=given`` would not be found among the files that are copied."""
    if given is None:
        return
    path, tracked = given.partition(":")[0], files(folder)
    if Path(path) not in tracked and Path("experiments", path) not in tracked:
        raise ConfigError(f"--config={path} is not a file that git tracks in {folder}, and would not be copied: put it there, git add it")


def pack(folder: Path, target: Path, scripts: dict[str, str]) -> None:
    """Write a .tar.gz of the code, under code/, and of ``scripts`` beside it."""
    with tarfile.open(target, "w:gz") as archive:
        for path in files(folder):
            archive.add(folder / path, Path("code") / path, recursive=False, filter=_anonymous)
        for name, text in scripts.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(text.encode()), 0o755
            archive.addfile(entry, io.BytesIO(text.encode()))


def stage(folder: Path, target: Path, scripts: dict[str, str]) -> None:
    """Copy the code to the folder ``target``, with ``scripts`` in it."""
    for path in files(folder):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / path, target / path)
    for name, text in scripts.items():
        (target / name).write_text(text)


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry
