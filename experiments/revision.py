"""Which code is run: for the rows and summaries that it writes."""

import hashlib
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the checkout, or where the packages are installed
PACKAGES = ("pallas_kernels", "hybrid_jax", "experiments", "launch")


def revision(root: Path = ROOT) -> str:
    """The commit of the checkout at ``root``; where more than results has changed "COMMIT+SOURCES", a hash of what the packages hold now,
    and outside of a checkout "+SOURCES": two states of the code never have one name.

    Packages that another project's checkout has in it, as in its .venv, are outside of theirs: git tracks this file in a checkout of it.
    """

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)

    tracked = shutil.which("git") is not None and git("ls-files", "--error-unmatch", "experiments/revision.py").returncode == 0
    if not tracked or (head := git("rev-parse", "HEAD")).returncode:
        return f"+{_sources(root)}"
    changed = git("status", "--porcelain", "--", ":/", ":(top,exclude)experiments/results").stdout
    return head.stdout.strip() + (f"+{_sources(root)}" if changed else "")


def _sources(root: Path) -> str:
    """A short hash of the names and contents of all Python files of the packages, whether git knows them or not."""
    found = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        name, content = str(path.relative_to(root)).encode(), path.read_bytes()
        found.update(b"%d %d %b%b" % (len(name), len(content), name, content))
    return found.hexdigest()[:12]
