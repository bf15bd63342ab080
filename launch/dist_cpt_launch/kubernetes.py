"""A run as Kubernetes objects: a Kubeflow TrainJob with its own runtime, or a plain JobSet.

Both start the same pods: one per node, torchrun's agent in each, the recipe from a ConfigMap, the run folder on a
volume. A pod that fails takes the whole set with it, and the set starts again from the last checkpoint, unless the
exit code says that the same again would end the same way.

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
from pydantic import Field, PositiveInt, ValidationError, field_validator

from dist_cpt.config.load import load_recipe, parse_yaml
from dist_cpt.config.resolve import resolve_paths, run_folder, step_shape
from dist_cpt.config.schema import Frozen, RunConfig
from dist_cpt.errors import EXIT_DONE, EXIT_NODE, ConfigError
from dist_cpt_launch.attempts import FINAL
from dist_cpt_launch.secret_values import SECRET_NAME, require_no_secrets
from dist_cpt_launch.time_limit import lead_seconds

Kind = Literal["trainjob", "jobset"]
KINDS: tuple[Kind, ...] = ("trainjob", "jobset")

RECIPE_FOLDER = "/etc/dist-cpt"
JOB = "node"  # the replicated job, and its container: the name that Kubeflow looks for
PORT = 29500
MAX_NAME = 44  # leaves room for -node-0-9999 in 63 characters
AGENT_SECONDS = 10  # between the agent's last word to the ranks and the pod's end
MAX_RECIPE_BYTES = 1 << 19  # a ConfigMap holds 1 MiB
KUBECTL_SECONDS = 60

_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_SUBDOMAIN = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"
_QUANTITY = r"[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?)?"
_PATH = r"/[A-Za-z0-9._/-]*"
_FOR_GOOD = sorted(set(FINAL) - {EXIT_NODE})  # a pod that failed its checks may land on another node next time


class SecretRef(Frozen):
    """A key of a Secret in the namespace; its value is never read here."""

    name: str = Field(pattern=f"^{_SUBDOMAIN}$")
    key: str = Field(pattern=r"^[-._a-zA-Z0-9]{1,253}$")
    optional: bool = False


class Volume(Frozen):
    """A persistent volume claim and where it is mounted."""

    claim: str = Field(pattern=f"^{_SUBDOMAIN}$")
    path: str = Field(pattern=f"^{_PATH}$")
    read_only: bool = False


class ClusterSettings(Frozen):
    """What a cluster needs to know beside the recipe; no field takes the value of a secret."""

    image: str = Field(pattern=r"^[a-z0-9][A-Za-z0-9._/:@-]{0,511}$")
    volumes: tuple[Volume, ...] = Field(min_length=1)  # relative paths of the recipe start at the first one
    namespace: str = Field(default="default", pattern=f"^{_LABEL}$")
    accelerator: str | None = Field(default="nvidia.com/gpu", pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")  # null: CPU
    cpu: str | None = Field(default=None, pattern=f"^{_QUANTITY}$")
    memory: str | None = Field(default=None, pattern=f"^{_QUANTITY}$")
    shared_memory: str = Field(default="16Gi", pattern=f"^{_QUANTITY}$")  # /dev/shm, for NCCL
    secrets: dict[str, SecretRef] = Field(default_factory=dict)  # environment variable -> where its value is
    env: dict[str, str] = Field(default_factory=dict)
    node_selector: dict[str, str] = Field(default_factory=dict)
    service_account: str | None = Field(default=None, pattern=f"^{_SUBDOMAIN}$")
    image_pull_secret: str | None = Field(default=None, pattern=f"^{_SUBDOMAIN}$")
    max_restarts: int = Field(default=20, ge=0)
    grace_seconds: PositiveInt | None = None  # to stop and save; default: measured in the run folder, else 300
    preflight: bool = True  # check every node before the ranks start

    @field_validator("env", "secrets")
    @classmethod
    def _names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is no name of an environment variable")
        return value

    @field_validator("env")
    @classmethod
    def _plain(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if SECRET_NAME.search(name):
                raise ValueError(f"{name} looks like a secret; name its Secret under `secrets`")
            if name.startswith("PET_") or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
                raise ValueError(f"{name} is set for each pod and cannot be given")
        return value

    @field_validator("volumes")
    @classmethod
    def _paths(cls, value: tuple[Volume, ...]) -> tuple[Volume, ...]:
        for volume in value:
            if ".." in PurePosixPath(volume.path).parts or volume.path == "/":
                raise ValueError(f"volumes: {volume.path} cannot be mounted on")
        if value[0].read_only:
            raise ValueError("volumes: the first one holds the run folder and must be writable")
        return value


@dataclass(frozen=True)
class KubernetesPlan:
    """The objects of one run, in the order in which they are applied."""

    name: str
    namespace: str
    documents: tuple[dict[str, Any], ...]

    def shown(self) -> str:
        """The manifest that is applied, byte for byte."""
        return yaml.dump_all(self.documents, Dumper=_Dumper, sort_keys=False, width=2**20)


def load_settings(path: Path) -> ClusterSettings:
    """The settings in a YAML file.

    Raises:
        ConfigError: missing, no YAML, or a key or value does not fit; one line.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    try:
        return ClusterSettings.model_validate(content)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'the file'}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        ]
        raise ConfigError(f"{path}: {'; '.join(problems)}", remedy="docs/kubernetes.md lists the keys") from error


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
        ConfigError: the recipe does not load or divide, keeps its run folder outside of the volumes, or holds the
            value of a secret.
    """
    config = load_recipe(recipe, overrides)
    step_shape(config, nodes * procs_per_node)
    text = recipe.read_text(encoding="utf-8")
    require_no_secrets([text, *overrides, *settings.env.values()], "what would be rendered")
    if len(text.encode()) > MAX_RECIPE_BYTES:
        raise ConfigError(f"{recipe} has {len(text.encode())} bytes, a ConfigMap takes {MAX_RECIPE_BYTES}")
    folder = _folder_in_pod(config, settings)
    # On the launching host the run folder may not exist; then nothing was measured.
    grace = settings.grace_seconds or lead_seconds(run_folder(resolve_paths(config)))
    pod = _pod(settings, overrides, folder, nodes, procs_per_node, grace)
    name = object_name(config.name)
    meta = {
        "name": name,
        "namespace": settings.namespace,
        "labels": {"app.kubernetes.io/name": "dist-cpt"},
        "annotations": {"dist-cpt/run": config.name},
    }
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": meta | {"name": f"{name}-recipe"},
        "data": {"recipe.yaml": text},
    }
    pod["volumes"].append({"name": "recipe", "configMap": {"name": f"{name}-recipe"}})
    render = _train_job if kind == "trainjob" else _job_set
    documents = render(name, meta, pod, settings, nodes, procs_per_node)
    return KubernetesPlan(name, settings.namespace, (config_map, *documents))


def apply(plan: KubernetesPlan) -> int:
    """Hand the manifest to kubectl; 0.

    Raises:
        ConfigError: kubectl is absent, does not answer, or refuses.
    """
    tool = shutil.which("kubectl")
    if tool is None:
        raise ConfigError("kubectl is not on PATH", remedy="install it, or apply what --dry-run prints elsewhere")
    command = [tool, "apply", "--namespace", plan.namespace, "--filename", "-"]
    try:
        done = subprocess.run(
            command, input=plan.shown(), text=True, capture_output=True, timeout=KUBECTL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"kubectl did not answer within {KUBECTL_SECONDS} s") from None
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise ConfigError(f"kubectl apply: {said[-1].strip() if said else f'exit code {done.returncode}'}")
    print(done.stdout, end="", flush=True)
    print(f"kubectl --namespace {plan.namespace} get pods --selector jobset.sigs.k8s.io/jobset-name={plan.name}",
          file=sys.stderr)  # fmt: skip
    return EXIT_DONE


def object_name(name: str) -> str:
    """A run's name as Kubernetes takes it; one that had to change, or be cut, ends with a hash of the original."""
    plain = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")
    if plain == name and len(plain) <= MAX_NAME and plain[0].isalpha():
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    plain = plain if plain[:1].isalpha() else f"run-{plain}"
    return f"{plain[: MAX_NAME - 9].strip('-')}-{digest}"


# -- the pod -------------------------------------------------------------------------------------------------------


def _folder_in_pod(config: RunConfig, settings: ClusterSettings) -> str:
    """The run folder as the pod sees it; it must outlive the pod."""
    root = PurePosixPath(settings.volumes[0].path)
    folder = root / config.output_dir / config.name
    kept = [PurePosixPath(volume.path) for volume in settings.volumes if not volume.read_only]
    if ".." in folder.parts or not any(folder.is_relative_to(path) for path in kept):
        raise ConfigError(
            f"output_dir {config.output_dir} lies on no writable volume: the run folder would end with the pod",
            remedy=f"use a path relative to {root}, or one below a volume",
        )
    return str(folder)


def _pod(
    settings: ClusterSettings, overrides: Sequence[str], folder: str, nodes: int, procs: int, grace: int
) -> dict[str, Any]:
    mounts = [
        {"name": "recipe", "mountPath": RECIPE_FOLDER, "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    volumes: list[dict[str, Any]] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory}}
    ]
    for number, volume in enumerate(settings.volumes):
        mounts.append({"name": f"volume-{number}", "mountPath": volume.path, "readOnly": volume.read_only})
        claim = {"claimName": volume.claim, "readOnly": volume.read_only}
        volumes.append({"name": f"volume-{number}", "persistentVolumeClaim": claim})
    amounts = {"cpu": settings.cpu, "memory": settings.memory}
    if settings.accelerator is not None:
        amounts[settings.accelerator] = str(procs)
    limits = {key: value for key, value in amounts.items() if value is not None}
    common = {
        "image": settings.image,
        "workingDir": settings.volumes[0].path,
        "resources": {"limits": limits, "requests": dict(limits)},
        "volumeMounts": mounts,
    }
    container = {"name": JOB, "command": ["python"], "args": _arguments(overrides, grace), **common}
    # A pod that starts again takes the run over, though a lost node may still hold a lock on the volume.
    job = _field("DIST_CPT_JOB", "metadata.labels['jobset.sigs.k8s.io/jobset-name']")
    container["env"] = [job, *_environment(settings), *_secrets(settings)]
    pod: dict[str, Any] = {"restartPolicy": "Never", "terminationGracePeriodSeconds": grace}
    if settings.service_account:
        pod["serviceAccountName"] = settings.service_account
    if settings.image_pull_secret:
        pod["imagePullSecrets"] = [{"name": settings.image_pull_secret}]
    if settings.node_selector:
        pod["nodeSelector"] = dict(settings.node_selector)
    if settings.preflight:
        pod["initContainers"] = [_preflight(settings, common, folder, nodes, procs)]
    return pod | {"containers": [container], "volumes": volumes}


def _arguments(overrides: Sequence[str], grace: int) -> list[str]:
    """torchrun's agent reads where it is from PET_* variables; a dollar of the user's stays a dollar."""
    shutdown = max(grace - AGENT_SECONDS, 1)
    arguments = ["-m", "dist_cpt.runtime.torchrun", "--max-restarts=0", f"--shutdown-timeout={shutdown}"]
    arguments += ["-m", "dist_cpt.cli", "train", f"{RECIPE_FOLDER}/recipe.yaml"]
    for item in overrides:
        arguments += ["--set", _inert(item)]
    return arguments


def _preflight(
    settings: ClusterSettings, common: dict[str, Any], folder: str, nodes: int, procs: int
) -> dict[str, Any]:
    """The check of each node, as an init container: all pods meet there first."""
    arguments = ["-m", "dist_cpt_launch.preflight", f"--run-folder={folder}", "--id=$(JOB_UID)"]
    arguments += ["--node=$(NODE_NAME)-$(NODE_INDEX)"]  # two pods may share a node
    arguments += [f"--nodes={nodes}", "--node-index=$(NODE_INDEX)", "--master=$(MASTER)"]
    if settings.accelerator == "nvidia.com/gpu":
        arguments.append(f"--gpus={procs}")
    env = [
        _field("JOB_UID", "metadata.labels['batch.kubernetes.io/controller-uid']"),  # new with every restart
        _field("NODE_NAME", "spec.nodeName"),
        _field("NODE_INDEX", "metadata.annotations['batch.kubernetes.io/job-completion-index']"),
        _field("JOBSET", "metadata.labels['jobset.sigs.k8s.io/jobset-name']"),
        {"name": "MASTER", "value": f"$(JOBSET)-{JOB}-0-0.$(JOBSET)"},
    ]
    return {"name": "preflight", "command": ["python"], "args": arguments, "env": env, **common}


def _environment(settings: ClusterSettings) -> list[dict[str, Any]]:
    return [{"name": name, "value": _inert(value)} for name, value in settings.env.items()]


def _secrets(settings: ClusterSettings) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "valueFrom": {"secretKeyRef": {"name": ref.name, "key": ref.key, "optional": ref.optional}},
        }
        for name, ref in settings.secrets.items()
    ]


def _field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _inert(text: str) -> str:
    """Kubernetes puts variables in for $(NAME) in arguments and values, and takes $$ as a plain dollar."""
    return text.replace("$", "$$")


# -- around the pod ------------------------------------------------------------------------------------------------


def _job(pod: dict[str, Any], nodes: int) -> dict[str, Any]:
    """One indexed pod per node; the first failure fails the job, and says by its reason whether to start again."""
    return {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": _FOR_GOOD}}]},
        "template": {"spec": pod},
    }


def _set_policies(settings: ClusterSettings) -> dict[str, Any]:
    final = {"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "successPolicy": {"operator": "All"},
        "failurePolicy": {"maxRestarts": settings.max_restarts, "rules": [final]},
    }


def _job_set(
    name: str, meta: dict[str, Any], pod: dict[str, Any], settings: ClusterSettings, nodes: int, procs: int
) -> list[dict[str, Any]]:
    where = [
        {"name": "PET_NNODES", "value": str(nodes)},
        {"name": "PET_NPROC_PER_NODE", "value": str(procs)},
        _field("PET_NODE_RANK", "metadata.annotations['batch.kubernetes.io/job-completion-index']"),
        {"name": "PET_MASTER_ADDR", "value": f"{name}-{JOB}-0-0.{name}"},
        {"name": "PET_MASTER_PORT", "value": str(PORT)},
    ]
    container = pod["containers"][0]
    container["env"] = [*where, *container["env"]]
    jobs = [{"name": JOB, "replicas": 1, "template": {"spec": _job(pod, nodes)}}]
    spec = _set_policies(settings) | {"replicatedJobs": jobs}
    return [{"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": meta, "spec": spec}]


def _train_job(
    name: str, meta: dict[str, Any], pod: dict[str, Any], settings: ClusterSettings, nodes: int, procs: int
) -> list[dict[str, Any]]:
    """The job, and a runtime of its own: a TrainJob itself cannot say when not to start again."""
    container = pod["containers"][0]
    trainer = {
        "image": container["image"],
        "command": container["command"],
        "args": container["args"],
        "env": container["env"],
        "numNodes": nodes,
        "numProcPerNode": procs,
        "resourcesPerNode": container["resources"],
    }
    held = ("name", "image", "workingDir", "volumeMounts")
    template = pod | {"containers": [{key: container[key] for key in held}]}
    ancestor = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    jobs = [{"name": JOB, "replicas": 1, "template": {"metadata": {"labels": ancestor}, "spec": _job(template, nodes)}}]
    runtime = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": meta | {"name": f"{name}-runtime"},
        "spec": {
            "mlPolicy": {"numNodes": nodes, "torch": {}},
            "template": {"spec": _set_policies(settings) | {"replicatedJobs": jobs}},
        },
    }
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": f"{name}-runtime"}
    job = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": meta,
        "spec": {"runtimeRef": reference, "trainer": trainer},
    }
    return [runtime, job]


class _Dumper(yaml.SafeDumper):
    """No anchors, and text of several lines as such."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)
