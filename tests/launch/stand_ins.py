"""Stand-ins for gcloud, xpk, kubectl, sbatch and the machines behind them, and a way to run a launcher with them on PATH.

Each checks what it is called with against its reference (an unknown or missing flag fails, as it would there) and records it. The one for
gcloud has hosts: folders in which what is copied and run over ssh is really copied and run, by bash, with a Python that only acts.
"""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

COMMON = '''
import json, os, re, shutil, signal, subprocess, sys
from pathlib import Path

WORLD = Path(os.environ["WORLD"])

def load():
    return json.loads((WORLD / "world.json").read_text())

def save(world):
    temporary = WORLD / f"world.{os.getpid()}"
    temporary.write_text(json.dumps(world))
    temporary.replace(WORLD / "world.json")

def record(stdin=None):
    with open(WORLD / "calls.jsonl", "a") as file:
        print(json.dumps([Path(sys.argv[0]).name, *sys.argv[1:]]), file=file)
    if stdin is not None:
        (WORLD / f"{Path(sys.argv[0]).name}.stdin").write_text(stdin)

def fail(text, code=1):
    print(text, file=sys.stderr)
    sys.exit(code)

def flags(words, required, optional=(), switches=()):
    """Of --name=value words; what is not in the reference fails."""
    positional, values = [], {}
    for word in words:
        if not word.startswith("--"):
            positional.append(word)
            continue
        name, has_value, value = word[2:].partition("=")
        if (name in switches) == bool(has_value) or name not in (*required, *optional, *switches):
            fail(f"ERROR: (gcloud) unrecognized arguments: {word}", 2)
        values[name] = value
    missing = [name for name in required if name not in values]
    if missing:
        fail(f"ERROR: (gcloud) argument --{missing[0]}: Must be specified.", 2)
    return positional, values
'''

# https://docs.cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources
GCLOUD = '''
record()
words, world = sys.argv[1:], load()
PLACE = ("zone",)
ANY = ("project", "format")

def interrupt(place):
    """Ctrl-C, when the scenario says so."""
    if world.get("ctrl_c") == place:
        world["ctrl_c"] = None
        save(world)
        os.kill(os.getppid(), signal.SIGINT)

def failing(what):
    """Whether it fails this time, as the scenario says how often."""
    left = world["failures"].get(what, 0)
    world["failures"][what] = left - 1
    save(world)
    return left > 0

if words[:3] == ["compute", "tpus", "tpu-vm"]:
    assert words[3:5] == ["accelerator-types", "list"], words
    _, given = flags(words[5:], PLACE, ANY)
    if given["zone"] not in world["offered"]:
        fail(f"ERROR: (gcloud.compute.tpus.tpu-vm.accelerator-types.list) PERMISSION_DENIED: Permission denied on "
             f"'locations/{given['zone']}' (or it may not exist).")
    print("\\n".join(world["offered"][given["zone"]]))
    sys.exit()
if words[:3] == ["storage", "buckets", "describe"]:
    (url,), _ = flags(words[3:], (), ANY)
    if url not in world["buckets"]:
        fail(f"ERROR: (gcloud.storage.buckets.describe) {url} not found: 404.")
    print(world["buckets"][url])
    sys.exit()
if words[:2] == ["storage", "cp"]:
    (source, target), _ = flags(words[2:], (), ("project",))
    if "/".join(target.split("/")[:3]) not in world["buckets"]:
        fail(f"ERROR: (gcloud.storage.cp) {target} not found: 404.")
    shutil.copy(source, WORLD / Path(target).name)
    sys.exit()
if words[:3] == ["batch", "jobs", "submit"]:
    (name,), given = flags(words[3:], ("location", "config"), ("project",))
    assert given["config"] == "-"
    (WORLD / "gcloud.stdin").write_text(sys.stdin.read())
    sys.exit()

assert words[:3] == ["compute", "tpus", "queued-resources"], words
verb, rest = words[3], words[4:]
tpu = world.get("tpu")
if verb == "create":
    (name,), given = flags(rest, ("zone", "accelerator-type", "runtime-version"),
                           ("project", "node-id", "node-count", "node-prefix"), ("spot", "reserved"))
    if ("node-id" in given) == ("node-count" in given) or int(given.get("node-count", 2)) < 2:
        fail("ERROR: (gcloud) exactly one of --node-id and --node-count (at least 2)", 2)
    if tpu:
        fail(f"ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: Resource '{name}' already exists")
    if world["lives"] and failing("create"):
        fail("ERROR: (gcloud.compute.tpus.queued-resources.create) UNAVAILABLE: The service is currently unavailable.")
    if world.get("create_error"):
        fail(f"ERROR: (gcloud.compute.tpus.queued-resources.create) {world['create_error']}")
    world["lives"] += 1
    states = world["states"][min(world["lives"], len(world["states"])) - 1]
    world["tpu"] = {"name": name, "states": list(states), **given}
    for host in range(world["hosts"]):
        (WORLD / f"host{host}").mkdir()
    save(world)
    sys.exit()

if world.get("unreachable"):
    fail(f"ERROR: (gcloud.compute.tpus.queued-resources.{verb}) UNAVAILABLE: The service is currently unavailable.")

def existing(name):
    if not tpu or tpu["name"] != name:
        fail(f"ERROR: (gcloud.compute.tpus.queued-resources.{verb}) NOT_FOUND: Resource '{name}' was not found")

if verb == "describe":
    (name,), given = flags(rest, PLACE, ANY)
    existing(name)
    if "failedData" in given["format"]:
        print(world.get("why_failed", ""))
        sys.exit()
    print(tpu["states"][0])
    if len(tpu["states"]) > 1:
        tpu["states"].pop(0)
    save(world)
    interrupt("describe")
    sys.exit()
if verb == "delete":
    (name,), given = flags(rest, PLACE, ("project",), ("force", "quiet"))
    existing(name)
    if "force" not in given:
        fail("ERROR: FAILED_PRECONDITION: the queued resource has nodes")
    if failing("delete"):
        fail("ERROR: INTERNAL: try again")
    for host in range(world["hosts"]):
        shutil.rmtree(WORLD / f"host{host}")
    world["tpu"] = None
    save(world)
    sys.exit()

assert verb in ("ssh", "scp"), verb
names, given = flags(rest, ("zone", "node", "worker"), ("project", "command", "ssh-flag", "batch-size"), ("quiet",))
target = names[0] if verb == "ssh" else names[1].split(":")[0]
existing(target)
if tpu["states"][0] != "ACTIVE":
    fail("ERROR: (gcloud) the TPU is not in state READY", 255)
if verb == "scp":
    if failing("scp"):
        fail("ERROR: (gcloud.compute.tpus.queued-resources.scp) Connection refused")
    for host in range(world["hosts"]):
        shutil.copy(names[0], WORLD / f"host{host}" / names[1].split(":")[1])
    sys.exit()
if "setup.sh" in given["command"] and failing("install"):
    fail("ERROR: Could not find a version that satisfies the requirement uv", 1)
if "follow.sh" in given["command"]:
    interrupt("follow")
hosts = range(world["hosts"]) if given["worker"] == "all" else [int(given["worker"])]
codes = []
for host in hosts:
    home = WORLD / f"host{host}"
    environment = {"HOME": str(home), "PATH": f"{WORLD / 'host_bin'}:/usr/bin:/bin", "WORLD": str(WORLD), "HOST": str(host)}
    result = subprocess.run(["bash", "-c", given["command"]], cwd=home, env=environment)
    codes.append(result.returncode)
sys.exit(max(codes))
'''

# The machines' Python: pip, uv, and the trainer, which does what the scenario says of this life of the machines.
PYTHON = """
if sys.argv[1:3] == ["-m", "pip"]:
    sys.exit(load().get("pip_code", 0))
if sys.argv[1:3] == ["-m", "uv"]:
    if sys.argv[3] == "venv":
        folder = Path(sys.argv[-1], "bin")
        folder.mkdir(parents=True)
        shutil.copy(sys.argv[0], folder / "python")
        (folder / "activate").write_text(f"export PATH={folder.absolute()}:$PATH\\n")
    else:
        assert sys.argv[-1] == "./code[tpu,gcs]" and Path("code/setup.cfg").is_file()
    sys.exit()

import time
host, world = int(os.environ["HOST"]), load()
starts = WORLD / f"starts{host}.jsonl"
with open(starts, "a") as file:
    print(json.dumps([os.getcwd(), *sys.argv[1:]]), file=file)
acts = world["acts"]
act = acts[min(len(starts.read_text().splitlines()), len(acts)) - 1]
print(f"host {host}: step 1", flush=True)
if act == "preempted":
    if host == 0:
        world["tpu"]["states"] = ["SUSPENDING", "SUSPENDED"]
        save(world)
    sys.exit(134)
if act == "unreachable":
    if host == 0:
        save(world | {"unreachable": True})
    sys.exit(134)
if act == "deleted":
    if host == 0:
        save(world | {"tpu": None})
    sys.exit(134)
if act == "stopped":
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(0.2)
    sys.exit(143)
if act == "failed":
    print(f"host {host}: ValueError: out of luck", flush=True)
    sys.exit(1)
if act == "hanging":
    time.sleep(2)
print(f"host {host}: done", flush=True)
"""

# https://github.com/AI-Hypercomputer/xpk, src/xpk/parser/workload.py
XPK = """
record()
assert sys.argv[1] == "workload", sys.argv
verb = sys.argv[2]
place = ("cluster", "project", "zone")
if verb == "create":
    _, given = flags(sys.argv[3:], ("workload", "command", "tpu-type", *place),
                     ("num-slices", "max-restarts", "termination-grace-period-seconds", "base-docker-image", "script-dir"))
    if load().get("xpk_error"):
        fail(f"[XPK] {load()['xpk_error']}")
    shutil.copytree(given["script-dir"], WORLD / "image")
elif verb == "delete":
    flags(sys.argv[3:], ("workload", *place), (), ("force",))
else:
    flags(sys.argv[3:], ("filter-by-job", *place))
    print("gla Admitted")
"""

# https://kubernetes.io/docs/reference/kubectl. What is created is checked as the cluster would: fields and types by the JobSet's schema
# (https://github.com/kubernetes-sigs/jobset, config/components/crd/bases), what they mean together by its webhook and that of Jobs.
KUBECTL = """
record()
words, world = sys.argv[1:], load()
JOBSET = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {"name": str}}
CONTAINER = {"name": str, "image": str, "command": [str], "env": [{"name": str, "value": str}],
             "resources": {"requests": {str: str}, "limits": {str: str}},
             "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}]}
MOUNT = {"driver": str, "readOnly": bool, "volumeAttributes": {str: str}}
POD = {"restartPolicy": str, "containers": [CONTAINER], "volumes": [{"name": str, "csi": MOUNT}], "nodeSelector": {str: str},
       "tolerations": [{"key": str, "operator": str, "value": str, "effect": str}]}
RULE = {"action": str, "onPodConditions": [{"type": str, "status": str}]}
JOB = {"completionMode": str, "completions": int, "parallelism": int, "backoffLimitPerIndex": int, "podFailurePolicy": {"rules": [RULE]},
       "template": {"metadata": {"annotations": {str: str}}, "spec": POD}}
JOBSET["spec"] = {"replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}]}

def check(value, schema, path=""):
    if isinstance(schema, list):
        if not isinstance(value, list):
            fail(f"Error from server (BadRequest): {path}: expected a list")
        for each in value:
            check(each, schema[0], path)
    elif isinstance(schema, dict):
        for name in value:
            if name not in schema and str not in schema:
                fail(f'Error from server (BadRequest): strict decoding error: unknown field "{path}.{name}"')
            check(value[name], schema.get(name, str), f"{path}.{name}")
    elif value != schema if isinstance(schema, str) else type(value) is not schema:
        fail(f"Error from server (BadRequest): {path}: {value!r}")

def together(jobset):
    (task,) = jobset["spec"]["replicatedJobs"]
    job = task["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    longest = f"{jobset['metadata']['name']}-{task['name']}-{task['replicas'] - 1}-{job['completions'] - 1}-abcde"
    assert len(longest) <= 63, "pod names generated for this JobSet will exceed 63 characters"
    assert job["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never", "needed for backoffLimitPerIndex"
    assert all({"type", "status"} <= set(each) for rule in job["podFailurePolicy"]["rules"] for each in rule["onPodConditions"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    for sizes in container["resources"].values():
        assert all(re.fullmatch(r"\\d+(\\.\\d+)?(m|[KMG]i?)?", size) for size in sizes.values()), sizes
    if any(volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io" for volume in pod["volumes"]):
        assert job["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"

if words[0] == "logs":
    flags(words[1:], ("selector",), ("tail",), ("follow",))
    print("step 1")
    sys.exit()
context, verb, rest = words[0].removeprefix("--context="), words[1], words[2:]
if context not in world["contexts"]:
    fail(f'error: context "{context}" does not exist')
assert verb == "create", words
_, given = flags(rest, ("filename",), ("dry-run",))
if world.get("no_jobsets"):
    fail(f'error: resource mapping not found for name: "tokens" namespace: "" from "{given["filename"]}": no matches for kind "JobSet" '
         'in version "jobset.x-k8s.io/v1alpha2"\\nensure CRDs are installed first')
jobset = json.loads(Path(given["filename"]).read_text())
check(jobset, JOBSET)
together(jobset)
if jobset["metadata"]["name"] in world["jobsets"]:
    fail(f'Error from server (AlreadyExists): error when creating: jobsets.jobset.x-k8s.io "{jobset["metadata"]["name"]}" already exists')
if given.get("dry-run") == "server":
    sys.exit()
if world.get("create_error"):
    fail(world["create_error"])
(WORLD / "jobset.json").write_text(json.dumps(jobset))
save(world | {"jobsets": [*world["jobsets"], jobset["metadata"]["name"]]})
"""

# https://slurm.schedmd.com/sbatch.html
SBATCH = """
script = sys.stdin.read()
record(script)
assert sys.argv[1:] == ["--parsable"], sys.argv
lines = script.splitlines()
assert lines[0] == "#!/bin/bash"
known = ("job-name time partition account nodes ntasks-per-node gpus-per-node cpus-per-task array output open-mode requeue signal").split()
for line in lines[1:]:
    if line.startswith("#SBATCH"):
        name = re.fullmatch(r"#SBATCH --([a-z-]+)(=\\S+)?", line)
        if not name or name[1] not in known:
            fail(f"sbatch: unrecognized option '{line}'")
if load().get("sbatch_error"):
    fail(f"sbatch: error: {load()['sbatch_error']}")
print("4711;cluster")
"""


class World:
    """Stand-ins on PATH, what they are to act out, and what they were called with."""

    def __init__(self, folder: Path, **scenario):
        self.folder = folder
        self.bin = folder / "bin"
        (folder / "host_bin").mkdir(parents=True)
        self.bin.mkdir()
        for name, source in {"gcloud": GCLOUD, "xpk": XPK, "kubectl": KUBECTL, "sbatch": SBATCH}.items():
            self.write(self.bin / name, source)
        self.write(folder / "host_bin" / "python3", PYTHON)
        (self.bin / "git").symlink_to(shutil.which("git"))
        world = {
            "offered": {"us-central2-b": ["v4-8", "v4-16", "v4-32"], "us-west4-a": ["v5litepod-16", "v5litepod-256"]},
            "buckets": {"gs://bucket": "US-CENTRAL2"},
            "contexts": ["gke_p_us-central1_pods"],
            "jobsets": [],
            "hosts": 2,
            "lives": 0,
            "tpu": None,
            "states": [["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]],
            "acts": ["done"],
            "failures": {},
        }
        (folder / "world.json").write_text(json.dumps(world | scenario))

    def write(self, file: Path, source: str) -> None:
        file.write_text(f"#!{sys.executable} -SE\n{COMMON}{textwrap.dedent(source)}")
        file.chmod(0o755)

    def remove(self, tool: str) -> None:
        (self.bin / tool).unlink()

    def environment(self) -> dict[str, str]:
        return {"PATH": str(self.bin), "WORLD": str(self.folder), "HOME": str(self.folder), "PYTHONPATH": str(ROOT)}

    def command(self, module: str, *arguments: str) -> list[str]:
        """The launcher, impatient."""
        impatient = "from launch import supervise; supervise.POLL_SECONDS = 0.05; supervise.GRACE_SECONDS = 0.3"
        main = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
        return [sys.executable, "-c", f"{impatient}; {main}", *arguments]

    def run(self, module: str, *arguments: str, **keywords) -> subprocess.CompletedProcess:
        keywords = {"stdin": subprocess.DEVNULL} | keywords
        return subprocess.run(
            self.command(module, *arguments), env=self.environment(), cwd=ROOT, capture_output=True, text=True, timeout=60, **keywords
        )

    def calls(self, tool: str | None = None) -> list[list[str]]:
        file = self.folder / "calls.jsonl"
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [call for call in calls if tool in (None, call[0])]

    def verbs(self) -> list[str]:
        """What was done with queued resources, without the questions after their state."""
        return [call[4] for call in self.calls("gcloud") if call[3] == "queued-resources" and call[4] != "describe"]

    def state(self) -> dict:
        return json.loads((self.folder / "world.json").read_text())

    def starts(self, host: int) -> list[list[str]]:
        """The folder and arguments of every start of the trainer on ``host``."""
        file = self.folder / f"starts{host}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
