"""A run as Kubernetes objects: a Kubeflow TrainJob with its own runtime, or a plain JobSet.

Both start the same pods: one per node, torchrun's agent in each, the recipe from a ConfigMap, the run folder on a
volume. A pod that fails ends the whole set, which restarts from the last checkpoint unless the exit code is final.

Source: batch/v1 Job, jobset.x-k8s.io/v1alpha2, trainer.kubeflow.org/v1alpha1 (Kubeflow Trainer 2.3).
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from dist_cpt.config.load import load_recipe
from dist_cpt.config.resolve import resolve_paths, run_folder, step_shape
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import EXIT_DONE, EXIT_NODE, FINAL_CODES, ConfigError
from dist_cpt.run_folder.names import RECIPE
from dist_cpt.runtime.secret_values import require_no_secrets
from dist_cpt_launch.kubernetes_settings import ClusterSettings
from dist_cpt_launch.time_limit import save_before_limit

Kind = Literal["trainjob", "jobset"]
KINDS: tuple[Kind, ...] = ("trainjob", "jobset")

RECIPE_FOLDER = "/etc/dist-cpt"
JOB = "node"  # the replicated job and its container; Kubeflow requires this name
PORT = 29500
MAX_NAME = 44  # leaves room for -node-0-9999 in 63 characters
AGENT_SECONDS = 10  # for torchrun's agent to exit after its ranks
MAX_RECIPE_BYTES = 1 << 19  # a ConfigMap holds 1 MiB
KUBECTL_SECONDS = 60

_SAFE_PATH = {"name": "PYTHONSAFEPATH", "value": "1"}  # `-m` would import a yaml.py of the working directory
_COMPLETION_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
_JOBSET_NAME = "metadata.labels['jobset.sigs.k8s.io/jobset-name']"
_FINAL_CODES = sorted(set(FINAL_CODES) - {EXIT_NODE})  # a pod that failed its node checks may land on another node

Object = dict[str, Any]


@dataclass(frozen=True)
class KubernetesPlan:
    """The objects of one run, in the order in which they are applied."""

    name: str
    namespace: str
    documents: tuple[Object, ...]

    def manifest(self) -> str:
        """The YAML that is applied, byte for byte."""
        return yaml.dump_all(self.documents, Dumper=_Dumper, sort_keys=False, width=2**20)


@dataclass(frozen=True)
class _Pods:
    """What the objects of one run have in common."""

    name: str
    nodes: int
    procs_per_node: int
    run_folder: str  # as the pods see it
    grace_seconds: int  # from SIGTERM to SIGKILL
    overrides: Sequence[str]
    settings: ClusterSettings


def kubernetes_plan(
    recipe: Path,
    overrides: Sequence[str],
    settings: ClusterSettings,
    *,
    kind: Kind = "trainjob",
    nodes: int = 1,
    procs_per_node: int = 1,
) -> KubernetesPlan:
    """The objects for `nodes` pods of `procs_per_node` ranks.

    Raises:
        ConfigError: the recipe is invalid or does not divide over the ranks, its run folder is outside of the volumes,
            or it contains the value of a secret.
    """
    config = load_recipe(recipe, overrides)
    step_shape(config, nodes * procs_per_node)
    text = recipe.read_text(encoding="utf-8")
    require_no_secrets([text, *overrides, *settings.env.values()], "the manifest")
    if len(text.encode()) > MAX_RECIPE_BYTES:
        raise ConfigError(f"{recipe} has {len(text.encode())} bytes, a ConfigMap takes {MAX_RECIPE_BYTES}")
    # The launching host may not see the run folder; save_before_limit then returns its default.
    grace = settings.grace_seconds or save_before_limit(run_folder(resolve_paths(config)))
    name, folder = object_name(config.name), _run_folder_in_pod(config, settings)
    pods = _Pods(name, nodes, procs_per_node, folder, grace, overrides, settings)
    metadata = {
        "name": name,
        "namespace": settings.namespace,
        "labels": {"app.kubernetes.io/name": "dist-cpt"},
        "annotations": {"dist-cpt/run": config.name},
    }
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata | {"name": f"{name}-recipe"},
        "data": {RECIPE: text},
    }
    documents = _train_job(pods, metadata) if kind == "trainjob" else _job_set(pods, metadata)
    return KubernetesPlan(name, settings.namespace, (config_map, *documents))


def apply(plan: KubernetesPlan) -> int:
    """Hand the manifest to kubectl; 0.

    Raises:
        ConfigError: kubectl is missing, times out or fails.
    """
    tool = shutil.which("kubectl")
    if tool is None:
        raise ConfigError("kubectl is not on PATH", remedy="install it, or apply the output of --dry-run elsewhere")
    command = [tool, "apply", "--namespace", plan.namespace, "--filename", "-"]
    try:
        done = subprocess.run(
            command, input=plan.manifest(), text=True, capture_output=True, timeout=KUBECTL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"kubectl did not answer within {KUBECTL_SECONDS} s") from None
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise ConfigError(f"kubectl apply: {lines[-1] if lines else f'exit code {done.returncode}'}")
    print(done.stdout, end="", flush=True)
    selector = f"jobset.sigs.k8s.io/jobset-name={plan.name}"
    print(f"kubectl --namespace {plan.namespace} get pods --selector {selector}", file=sys.stderr)
    return EXIT_DONE


def object_name(name: str) -> str:
    """A run's name as a Kubernetes name; a changed or shortened one ends with a hash of the original."""
    plain = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")
    if plain == name and len(plain) <= MAX_NAME and plain[0].isalpha():
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    plain = plain if plain[:1].isalpha() else f"run-{plain}"
    return f"{plain[: MAX_NAME - 9].strip('-')}-{digest}"


# -- the pod -------------------------------------------------------------------------------------------------------


def _run_folder_in_pod(config: RunConfig, settings: ClusterSettings) -> str:
    root = PurePosixPath(settings.volumes[0].path)
    folder = root / config.output_dir / config.name
    writable = [volume.path for volume in settings.volumes if not volume.read_only]
    if ".." in folder.parts or not any(folder.is_relative_to(path) for path in writable):
        raise ConfigError(
            f"output_dir {config.output_dir} is not on a writable volume: the run folder would be lost with the pod",
            remedy=f"use a path relative to {root}, or one below a volume",
        )
    return str(folder)


def _pod(pods: _Pods) -> Object:
    """The pod's specification, with the node checks as an init container."""
    settings = pods.settings
    mounts = [
        {"name": "recipe", "mountPath": RECIPE_FOLDER, "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    volumes: list[Object] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory}}]
    for number, volume in enumerate(settings.volumes):
        mounts.append({"name": f"volume-{number}", "mountPath": volume.path, "readOnly": volume.read_only})
        claim = {"claimName": volume.claim, "readOnly": volume.read_only}
        volumes.append({"name": f"volume-{number}", "persistentVolumeClaim": claim})
    volumes.append({"name": "recipe", "configMap": {"name": f"{pods.name}-recipe"}})
    amounts = {"cpu": settings.cpu, "memory": settings.memory}
    if settings.accelerator is not None:
        amounts[settings.accelerator] = str(pods.procs_per_node)
    limits = {key: value for key, value in amounts.items() if value is not None}
    common = {
        "image": settings.image,
        "workingDir": settings.volumes[0].path,
        "resources": {"limits": limits, "requests": dict(limits)},
        "volumeMounts": mounts,
    }
    spec: Object = {"restartPolicy": "Never", "terminationGracePeriodSeconds": pods.grace_seconds}
    if settings.service_account:
        spec["serviceAccountName"] = settings.service_account
    if settings.image_pull_secret:
        spec["imagePullSecrets"] = [{"name": settings.image_pull_secret}]
    if settings.node_selector:
        spec["nodeSelector"] = dict(settings.node_selector)
    if settings.preflight:
        spec["initContainers"] = [_preflight(pods) | common]
    return spec | {"containers": [_trainer(pods, common)], "volumes": volumes}


def _trainer(pods: _Pods, common: Object) -> Object:
    """The container of torchrun's agent, which reads its place from PET_* variables."""
    shutdown = max(pods.grace_seconds - AGENT_SECONDS, 1)
    arguments = ["-m", "dist_cpt.runtime.torchrun", "--max-restarts=0", f"--shutdown-timeout={shutdown}"]
    arguments += ["-m", "dist_cpt.cli", "train", f"{RECIPE_FOLDER}/{RECIPE}"]
    for override in pods.overrides:
        arguments += ["--set", _escaped(override)]
    container: Object = {"name": JOB, "command": ["python"], "args": arguments, **common}
    # Lets a restarted pod take over the run folder although a lost node may still hold the lock on the volume.
    container["env"] = [_field("DIST_CPT_JOB", _JOBSET_NAME), _SAFE_PATH]
    container["env"] += [{"name": name, "value": _escaped(value)} for name, value in pods.settings.env.items()]
    for name, ref in pods.settings.secrets.items():
        reference = {"name": ref.name, "key": ref.key, "optional": ref.optional}
        container["env"].append({"name": name, "valueFrom": {"secretKeyRef": reference}})
    return container


def _preflight(pods: _Pods) -> Object:
    arguments = ["-m", "dist_cpt_launch.preflight", f"--run-folder={pods.run_folder}", "--id=$(JOB_UID)"]
    arguments += ["--node=$(NODE_NAME)-$(NODE_INDEX)"]  # two pods may share a node
    arguments += [f"--nodes={pods.nodes}", "--node-index=$(NODE_INDEX)", "--master=$(MASTER)"]
    if pods.settings.accelerator == "nvidia.com/gpu":
        arguments.append(f"--gpus={pods.procs_per_node}")
    env = [
        _SAFE_PATH,
        _field("JOB_UID", "metadata.labels['batch.kubernetes.io/controller-uid']"),  # new with every restart
        _field("NODE_NAME", "spec.nodeName"),
        _field("NODE_INDEX", _COMPLETION_INDEX),
        _field("JOBSET", _JOBSET_NAME),
        {"name": "MASTER", "value": f"$(JOBSET)-{JOB}-0-0.$(JOBSET)"},
    ]
    return {"name": "preflight", "command": ["python"], "args": arguments, "env": env}


def _field(name: str, path: str) -> Object:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _escaped(text: str) -> str:
    """Kubernetes expands $(NAME) in arguments and values, and turns $$ into a plain dollar."""
    return text.replace("$", "$$")


# -- around the pod ------------------------------------------------------------------------------------------------


def _replicated_job(pods: _Pods, pod: Object, labels: Object) -> Object:
    """A JobSet's specification with one indexed pod per node; a final exit code fails the set for good."""
    final_codes = {"operator": "In", "values": _FINAL_CODES}
    job = {
        "completionMode": "Indexed",
        "completions": pods.nodes,
        "parallelism": pods.nodes,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": final_codes}]},
        "template": {"spec": pod},
    }
    final = {"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "successPolicy": {"operator": "All"},
        "failurePolicy": {"maxRestarts": pods.settings.max_restarts, "rules": [final]},
        "replicatedJobs": [{"name": JOB, "replicas": 1, "template": labels | {"spec": job}}],
    }


def _job_set(pods: _Pods, metadata: Object) -> list[Object]:
    place = [
        {"name": "PET_NNODES", "value": str(pods.nodes)},
        {"name": "PET_NPROC_PER_NODE", "value": str(pods.procs_per_node)},
        _field("PET_NODE_RANK", _COMPLETION_INDEX),
        {"name": "PET_MASTER_ADDR", "value": f"{pods.name}-{JOB}-0-0.{pods.name}"},
        {"name": "PET_MASTER_PORT", "value": str(PORT)},
    ]
    pod = _pod(pods)
    container = pod["containers"][0]
    container["env"] = [*place, *container["env"]]
    spec = _replicated_job(pods, pod, {})
    return [{"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}]


def _train_job(pods: _Pods, metadata: Object) -> list[Object]:
    """The job with a runtime of its own: a TrainJob has no field for final exit codes."""
    pod = _pod(pods)
    container = pod["containers"][0]
    trainer = {key: container[key] for key in ("image", "command", "args", "env")}
    trainer |= {"numNodes": pods.nodes, "numProcPerNode": pods.procs_per_node}
    trainer["resourcesPerNode"] = container["resources"]
    pod["containers"] = [{key: container[key] for key in ("name", "image", "workingDir", "volumeMounts")}]
    labels = {"metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}}
    template = {"spec": _replicated_job(pods, pod, labels)}
    runtime_name = f"{pods.name}-runtime"
    runtime = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": metadata | {"name": runtime_name},
        "spec": {"mlPolicy": {"numNodes": pods.nodes, "torch": {}}, "template": template},
    }
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": runtime_name}
    job = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": metadata,
        "spec": {"runtimeRef": reference, "trainer": trainer},
    }
    return [runtime, job]


class _Dumper(yaml.SafeDumper):
    """Without anchors, and with multi-line text as a block."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)
