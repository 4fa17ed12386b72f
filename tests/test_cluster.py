"""The examples for clusters: the shell reads them, their fields exist, and they begin a run or go on with it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from patience import PATIENCE

from trtkern.training.options import of_command

CLUSTER = Path(__file__).resolve().parent.parent / "examples" / "cluster"
SLURM = CLUSTER / "train.slurm"
SPEC = "spec.template.spec"
FIELDS: dict[str, dict[str, dict[str, type]]] = {
    "Service": {
        "": {"apiVersion": str, "kind": str, "metadata": dict, "spec": dict},
        "metadata": {"name": str},
        "spec": {"clusterIP": str, "publishNotReadyAddresses": bool, "selector": dict},
    },
    "Job": {
        "": {"apiVersion": str, "kind": str, "metadata": dict, "spec": dict},
        "metadata": {"name": str},
        "spec": {"completionMode": str, "completions": int, "parallelism": int, "backoffLimit": int, "template": dict},
        "spec.template": {"spec": dict},
        SPEC: {
            "subdomain": str, "restartPolicy": str, "terminationGracePeriodSeconds": int, "containers": list,
            "volumes": list,
        },
        f"{SPEC}.containers": {
            "name": str, "image": str, "command": list, "args": list, "env": list, "resources": dict,
            "volumeMounts": list,
        },
        f"{SPEC}.containers.env": {"name": str, "value": str},
        f"{SPEC}.containers.resources": {"limits": dict},
        f"{SPEC}.containers.volumeMounts": {"name": str, "mountPath": str, "readOnly": bool},
        f"{SPEC}.volumes": {"name": str, "persistentVolumeClaim": dict, "emptyDir": dict},
        f"{SPEC}.volumes.persistentVolumeClaim": {"claimName": str},
        f"{SPEC}.volumes.emptyDir": {"medium": str},
    },
}  # fmt: skip
"""Of Kubernetes' schema what is used of it: by the place of an object (a list's are all alike), its fields."""
FREE = ("spec.selector", f"{SPEC}.containers.resources.limits")
"""Objects whose fields the user names; their values are strings."""


def wrong(value: Any, fields: dict[str, dict[str, type]], place: str = "") -> list[str]:
    """What of an object is not in the schema."""
    if isinstance(value, list):
        return [line for each in value for line in wrong(each, fields, place)]
    if not isinstance(value, dict):
        return []
    if place in FREE:
        return [f"{place}.{name}: {found!r} is no string" for name, found in value.items() if type(found) is not str]
    lines = []
    for name, found in value.items():
        inside = f"{place}.{name}".lstrip(".")
        kind = fields.get(place, {}).get(name)
        if type(found) is not kind:
            lines.append(f"{inside}: expected {'no such field' if kind is None else kind.__name__}, got {found!r}")
        lines += wrong(found, fields, inside)
    return lines


def documents() -> dict[str, Any]:
    return {found["kind"]: found for found in yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())}


def test_the_job_has_fields_of_kubernetes():
    found = documents()
    assert found.keys() == FIELDS.keys()
    for kind, document in found.items():
        assert wrong(document, FIELDS[kind]) == []
    assert (found["Job"]["apiVersion"], found["Service"]["apiVersion"]) == ("batch/v1", "v1")
    spec = found["Job"]["spec"]
    spec["paralelism"] = spec.pop("parallelism")
    spec["completions"] = "2"
    spec["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"] = 64
    assert [line.partition(":")[0] for line in wrong(found["Job"], FIELDS["Job"])] == [
        "spec.completions", f"{SPEC}.containers.resources.limits.cpu", "spec.paralelism",
    ]  # fmt: skip


def test_the_pods_of_the_job_find_one_another():
    found = documents()
    job, service = found["Job"], found["Service"]
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    given = dict(word.removeprefix("--").partition("=")[::2] for word in container["args"])
    assert service["spec"]["selector"] == {"job-name": name}  # the label that Kubernetes gives the pods of a Job
    assert given["rdzv-endpoint"] == f"{name}-0.{pod['subdomain']}:29500"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert int(given["nnodes"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert given["nproc-per-node"] == container["resources"]["limits"]["nvidia.com/gpu"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    options = container["args"][container["args"].index("train") + 1 :]
    flags = {flag.partition("/")[0] for option in of_command() for flag in option.flags}
    assert options and {word.partition("=")[0] for word in options} <= flags


TOOLS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node1\\nnode2\\n"; else echo "scontrol $*" >> "$SAID"; fi',
    "srun": 'echo "srun $*" >> "$SAID"; [ -z "$WAITS" ] && exit "$ENDS"; trap "exit 130" TERM; touch "$WAITS"; '
    "while :; do sleep 0.02; done",
}
"""What the script calls, in place of SLURM's."""


@pytest.fixture
def submitted(tmp_path):
    """Runs the script as SLURM would; returns the process and the file of what it has called."""
    for name, text in TOOLS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def submit(*arguments: str, ends: int = 0, waits: str = "") -> subprocess.Popen:
        told = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "71", "SLURM_JOB_NAME": "job",
            "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "64",
            "SAID": str(tmp_path / "said"), "ENDS": str(ends), "WAITS": waits,
        }  # fmt: skip
        return subprocess.Popen(["bash", str(SLURM), *arguments], cwd=tmp_path, env=told)

    return submit


def test_the_shell_reads_the_script():
    subprocess.run(["bash", "-n", str(SLURM)], check=True)


def test_a_job_begins_a_run_and_goes_on_with_it(submitted, tmp_path):
    assert submitted("--recipe", "imagenet", "--data-dir", "/data").wait(PATIENCE) == 0
    run = tmp_path / "runs" / "job-71"
    run.mkdir(parents=True)
    (run / "plan.json").touch()
    assert submitted("--recipe", "imagenet", ends=3).wait(PATIENCE) == 3
    begun, again = (tmp_path / "said").read_text().splitlines()
    assert "--nnodes 2 --nproc-per-node 8 --max-restarts 3" in begun and "--rdzv-endpoint node1:29571" in begun
    assert "--cpus-per-task 64 torchrun " in begun and "--cpus-per-task 64 torchrun " in again
    options = f"--parallel ddp --sync-norm --recipe imagenet --data-dir /data --run-dir {run}"  # the user's come last
    assert begun.endswith(f" -m trtkern.cli train {options}") and again.endswith(
        f" -m trtkern.cli train --resume {run}"
    )


@pytest.mark.parametrize("ended", [False, True])
def test_a_job_whose_time_is_up_is_requeued_unless_its_run_has_ended(submitted, tmp_path, ended):
    process, ready = submitted(waits=str(tmp_path / "ready")), tmp_path / "ready"
    until = time.monotonic() + PATIENCE
    while not ready.exists() and time.monotonic() < until:
        time.sleep(0.02)
    if ended:
        (tmp_path / "runs" / "job-71").mkdir(parents=True)
        (tmp_path / "runs" / "job-71" / "result.json").touch()
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    assert ((tmp_path / "said").read_text().splitlines()[-1] == "scontrol requeue 71") == (not ended)
