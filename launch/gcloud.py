"""The commands of gcloud that a TPU VM's life is made of, as lists of words; nothing is run here.

Flags as in https://docs.cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources (create, describe, delete, ssh, scp) and
.../compute/tpus/tpu-vm/accelerator-types/list, .../storage/buckets/describe.
"""

import shlex
from typing import NamedTuple

TPUS = ("gcloud", "compute", "tpus")
QUEUED = (*TPUS, "queued-resources")


class Tpu(NamedTuple):
    """A queued resource: one slice, or several, under one name."""

    name: str
    zone: str
    project: str | None

    def _where(self) -> list[str]:
        return [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]

    def list_types(self) -> list[str]:
        return [*TPUS, "tpu-vm", "accelerator-types", "list", *self._where(), "--format=value(type)"]

    def create(self, accelerator: str, runtime: str, slices: int, tier: str | None) -> list[str]:
        """``tier``: "spot", "reserved", or None for on demand."""
        nodes = [f"--node-id={self.name}"] if slices == 1 else [f"--node-count={slices}", f"--node-prefix={self.name}"]
        wanted = [f"--accelerator-type={accelerator}", f"--runtime-version={runtime}", *nodes, *([f"--{tier}"] if tier else [])]
        return [*QUEUED, "create", self.name, *self._where(), *wanted]

    def state(self) -> list[str]:
        return [*QUEUED, "describe", self.name, *self._where(), "--format=value(state.state)"]

    def why_failed(self) -> list[str]:
        return [*QUEUED, "describe", self.name, *self._where(), "--format=value(state.failedData.error.message)"]

    def delete(self) -> list[str]:
        return [*QUEUED, "delete", self.name, *self._where(), "--force", "--quiet"]  # --force: its machines with it

    def copy(self, file: str, target: str) -> list[str]:
        return [*QUEUED, "scp", file, f"{self.name}:{target}", *self._where(), "--node=all", "--worker=all", "--quiet"]

    def on_all(self, command: str) -> list[str]:
        """Run ``command`` on every host of every slice; fails if it fails on one."""
        return [*QUEUED, "ssh", self.name, *self._where(), "--node=all", "--worker=all", "--quiet", f"--command={command}"]

    def on_first(self, command: str) -> list[str]:
        """Run ``command`` on the first host, and notice within minutes when that is gone."""
        alive = "--ssh-flag=-oServerAliveInterval=30"
        return [*QUEUED, "ssh", self.name, *self._where(), "--node=0", "--worker=0", "--quiet", alive, f"--command={command}"]

    def typed(self, verb: str) -> str:
        """This launcher's own command on the same resource."""
        return shlex.join(["python", "-m", "launch.tpu_vm", verb, f"--name={self.name}", *self._where()])


def describe_bucket(bucket: str, project: str | None) -> list[str]:
    return [
        "gcloud",
        "storage",
        "buckets",
        "describe",
        f"gs://{bucket}",
        *([f"--project={project}"] if project else []),
        "--format=value(location)",
    ]
