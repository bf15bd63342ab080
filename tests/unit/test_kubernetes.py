"""The manifests: golden, valid by the published models, inert against hostile names, free of secrets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from dist_cpt_launch.kubernetes import KINDS, Kind, apply, kubernetes_plan, object_name
from dist_cpt_launch.kubernetes_settings import ClusterSettings, load_settings
from kubeflow_trainer_api.models.io_k8s_api_core_v1_config_map import IoK8sApiCoreV1ConfigMap
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import TrainerV1alpha1TrainingRuntime

from dist_cpt.errors import ConfigError
from tests.command import command

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS: dict[str, Any] = {
    "ConfigMap": IoK8sApiCoreV1ConfigMap,
    "JobSet": JobsetV1alpha2JobSet,
    "TrainJob": TrainerV1alpha1TrainJob,
    "TrainingRuntime": TrainerV1alpha1TrainingRuntime,
}
SETTINGS = """
image: registry.example.org/dist-cpt:0.1.0
namespace: research
volumes:
  - {claim: training, path: /data}
  - {claim: models, path: /models, read_only: true}
cpu: "64"
memory: 512Gi
secrets:
  WANDB_API_KEY: {name: wandb, key: api-key, optional: true}
  HF_TOKEN: {name: hub, key: token}
env: {NCCL_DEBUG: WARN}
node_selector: {cloud.example.org/gpu: h100}
service_account: trainer
image_pull_secret: registry
"""
RECIPE = """
name: llama3-8b-legal
model: {path: /models/llama3-8b}
data: {seq_len: 4096, sources: [{path: corpus/legal.jsonl}]}
batch: {global_tokens: 524288, micro_batch: 2}
train: {tokens: 1_000_000_000}
engine: {kind: zero, stage: 3}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    """A recipe in an empty working directory: no run folder, so nothing was measured."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def settings(**changes: Any) -> ClusterSettings:
    return ClusterSettings.model_validate(yaml.safe_load(SETTINGS) | changes)


def pod_of(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """The pod's specification."""
    spec = documents[1]["spec"]
    return spec.get("template", {"spec": spec})["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def require_known(model: Any, value: Any, where: str = "") -> None:
    """Fail on a key that the model did not take: the published models ignore what they do not know."""
    taken = model.to_dict() if hasattr(model, "to_dict") else model

    def compare(given: Any, kept: Any, path: str) -> None:
        if isinstance(given, dict):
            assert isinstance(kept, dict), path
            for key, child in given.items():
                assert key in kept, f"{path}.{key} is unknown"
                compare(child, kept[key], f"{path}.{key}")
        elif isinstance(given, list):
            for number, (left, right) in enumerate(zip(given, kept, strict=True)):
                compare(left, right, f"{path}[{number}]")
        else:
            assert given == kept, path

    compare(value, taken, where)


@pytest.mark.parametrize("kind", KINDS)
def test_the_manifest_is_the_golden_one_and_fits_the_published_models(recipe, kind: Kind):
    plan = kubernetes_plan(recipe, ["seed=3"], settings(), kind=kind, nodes=2, procs_per_node=8)
    shown = plan.manifest()
    path = GOLDEN / f"kubernetes_{kind}.yaml"
    if os.environ.get("DIST_CPT_WRITE_GOLDEN"):
        path.write_text(shown)
    assert shown == path.read_text()
    documents = list(yaml.safe_load_all(shown))
    assert documents == [json.loads(json.dumps(document)) for document in plan.documents]
    for document in documents:
        require_known(MODELS[document["kind"]].from_dict(document), document, document["kind"])
    expected = ["ConfigMap", "TrainingRuntime", "TrainJob"] if kind == "trainjob" else ["ConfigMap", "JobSet"]
    assert [document["kind"] for document in documents] == expected


def test_the_models_would_notice_a_wrong_key(recipe):
    plan = kubernetes_plan(recipe, [], settings(), kind="jobset", procs_per_node=8)
    document = json.loads(json.dumps(plan.documents[1]))
    document["spec"]["failurePolicy"]["maxRestart"] = 1
    with pytest.raises(AssertionError, match=r"failurePolicy\.maxRestart is unknown"):
        require_known(JobsetV1alpha2JobSet.from_dict(document), document)
    document["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"][0]["action"] = "Stop"
    with pytest.raises(ValueError, match="enum"):
        JobsetV1alpha2JobSet.from_dict(document)


def test_the_grace_period_is_the_measured_time_to_save(recipe, tmp_path):
    run = tmp_path / "runs/llama3-8b-legal"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "step_seconds": 20.0, "tokens_per_second": 100.0}\n')
    (run / "events.jsonl").write_text('{"kind": "checkpoint", "seconds": 100.0}\n')
    plan = kubernetes_plan(recipe, [], settings(), procs_per_node=8)
    pod = pod_of(list(plan.documents))
    assert pod["terminationGracePeriodSeconds"] == 90 + 20 + 2 * 100
    assert "--shutdown-timeout=300" in plan.documents[2]["spec"]["trainer"]["args"]
    fixed = kubernetes_plan(recipe, [], settings(grace_seconds=77), procs_per_node=8)
    assert pod_of(list(fixed.documents))["terminationGracePeriodSeconds"] == 77


def test_the_agent_reads_its_place_from_the_environment_of_the_pod(recipe, monkeypatch):
    from torch.distributed.run import get_args_parser

    plan = kubernetes_plan(recipe, [], settings(), kind="jobset", nodes=2, procs_per_node=8)
    container = pod_of(list(plan.documents))["containers"][0]
    for variable in container["env"]:
        if variable["name"].startswith("PET_"):
            monkeypatch.setenv(variable["name"], variable.get("value", "1"))  # the one by reference is the pod's index
    assert container["args"][:2] == ["-m", "dist_cpt.runtime.torchrun"]
    asked = get_args_parser().parse_args(container["args"][2:])
    place = (asked.nnodes, asked.nproc_per_node, asked.node_rank, asked.master_addr, asked.master_port)
    assert place == ("2", "8", 1, "llama3-8b-legal-node-0-0.llama3-8b-legal", 29500)
    assert (asked.module, asked.training_script, asked.shutdown_timeout) == (True, "dist_cpt.cli", 290)
    assert asked.training_script_args == ["train", "/etc/dist-cpt/recipe.yaml"]


def test_two_pods_on_one_node_are_two_in_the_checks(recipe):
    plan = kubernetes_plan(recipe, [], settings(), nodes=2, procs_per_node=8)
    (check,) = pod_of(list(plan.documents))["initContainers"]
    (given,) = [item for item in check["args"] if item.startswith("--node=")]
    assert given == "--node=$(NODE_NAME)-$(NODE_INDEX)"
    assert {"NODE_NAME", "NODE_INDEX"} <= {variable["name"] for variable in check["env"]}


def test_hostile_values_stay_values(recipe):
    hostile = ["$(WANDB_API_KEY)", "a b", "x: {y: [", "ünïcödé ☃", "--- !!python/object", "line\nbreak", "'\"`${HOME}"]
    overrides = [f"data.cache_dir={json.dumps(text)}" for text in hostile]
    plan = kubernetes_plan(recipe, overrides, settings(env={"MOTTO": "$(HF_TOKEN)"}), kind="jobset", procs_per_node=8)
    documents = list(yaml.safe_load_all(plan.manifest()))
    container = pod_of(documents)["containers"][0]
    given = [item for item in container["args"] if item.startswith("data.cache_dir=")]
    # Kubernetes turns $$ into $ and puts nothing in.
    assert [item.replace("$$", "$") for item in given] == overrides
    assert not any("$(" in item.replace("$$", "") for item in container["args"])
    assert {"name": "MOTTO", "value": "$$(HF_TOKEN)"} in container["env"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama3-8b-legal", "llama3-8b-legal"),
        ("Llama3_8B.legal", "llama3-8b-legal-"),
        ("3b", "run-3b-"),
        ("a" * 100, "a" * 35 + "-"),
        ("a" * 34 + "-" + "b" * 60, "a" * 34 + "-"),
    ],
)
def test_names_fit_kubernetes_and_stay_apart(name, expected):
    made = object_name(name)
    assert made == name or (made.startswith(expected) and len(made) == len(expected) + 8)
    assert len(f"{made}-node-0-9999") <= 63
    assert object_name(name.upper()) != object_name(name)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image": "a b"}, "image"),
        ({"image": "x\n"}, "image"),
        ({"volumes": []}, "volumes"),
        ({"volumes": [{"claim": "a", "path": "/data/../etc"}]}, "/data/../etc"),
        ({"volumes": [{"claim": "a", "path": "/data", "read_only": True}]}, "volumes"),
        ({"namespace": "a; rm -rf /"}, "namespace"),
        ({"env": {"WANDB_API_KEY": "1234"}}, "WANDB_API_KEY"),
        ({"env": {"PET_NNODES": "1"}}, "PET_NNODES"),
        ({"env": {"A=B": "1"}}, "A=B"),
        ({"secrets": {"HF_TOKEN": "hf_abcdefgh"}}, "secrets.HF_TOKEN"),
        ({"wandb_key": "1234"}, "wandb_key"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(tmp_path, changes, named):
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(SETTINGS) | changes))
    with pytest.raises(ConfigError) as error:
        load_settings(path)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert "hf_abcdefgh" not in str(error.value)


def test_a_run_folder_outside_of_the_volumes_is_refused(recipe):
    for folder in ("/tmp/runs", "/models/runs", "../runs"):
        with pytest.raises(ConfigError, match="output_dir"):
            kubernetes_plan(recipe, [f"output_dir={folder}"], settings(), procs_per_node=8)
    plan = kubernetes_plan(recipe, ["output_dir=/data/elsewhere"], settings(), procs_per_node=8)
    assert "--run-folder=/data/elsewhere/llama3-8b-legal" in pod_of(list(plan.documents))["initContainers"][0]["args"]


def test_the_value_of_a_secret_is_refused_wherever_it_stands(recipe, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "sentinel-0123456789")
    for overrides, changes in (
        (["data.cache_dir=sentinel-0123456789"], {}),
        ([], {"env": {"A": "sentinel-0123456789"}}),
    ):
        with pytest.raises(ConfigError, match="MY_API_KEY") as error:
            kubernetes_plan(recipe, overrides, settings(**changes), procs_per_node=8)
        assert "sentinel" not in str(error.value)
    with pytest.raises(ConfigError, match="URL"):
        kubernetes_plan(recipe, ["data.cache_dir=https://me:hunter2@example.org/x"], settings(), procs_per_node=8)


@pytest.fixture
def cluster(tmp_path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(SETTINGS)
    return path


def test_dry_run_prints_what_kubectl_gets(recipe, cluster, tmp_path, monkeypatch):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "kubectl").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/argv\ncat > {tmp_path}/stdin\necho created\n')
    (tools / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    arguments = ["launch", recipe, "--on", "kubernetes", "--cluster", cluster, "--procs-per-node", 8, "--nodes", 2]
    shown = command(*arguments, "--dry-run")
    assert shown.code == 0, shown.err
    assert not (tmp_path / "argv").exists()
    done = command(*arguments)
    assert (done.code, done.out) == (0, "created\n")
    assert (tmp_path / "stdin").read_text() == shown.out
    assert (tmp_path / "argv").read_text() == "apply --namespace research --filename -\n"
    (tools / "kubectl").write_text(
        "#!/bin/sh\ncat > /dev/null\necho 'error: no matches for kind \"TrainJob\"' >&2\nexit 1\n"
    )
    refused = command(*arguments)
    assert (refused.code, len(refused.error_lines)) == (64, 1)
    assert 'no matches for kind "TrainJob"' in refused.error_lines[0]


def test_no_kubectl_is_one_line(recipe, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="kubectl"):
        apply(kubernetes_plan(recipe, [], settings(), procs_per_node=8))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--on", "kubernetes"], "--cluster FILE"),
        (["--on", "kubernetes", "--cluster", "cluster.yaml", "--kind", "pod"], "--kind pod"),
        (["--on", "kubernetes", "--cluster", "cluster.yaml", "--partition", "x"], "--partition"),
        (["--on", "kubernetes", "--cluster", "cluster.yaml", "--procs-per-node", "3"], "batch.global_tokens"),
        (["--on", "local", "--kind", "jobset"], "--kind"),
        (["--on", "kubernetes", "--cluster", "cluster.yaml", "--max-restarts", "3"], "--max-restarts"),
        (["--on", "kubernetes", "--cluster", "cluster.yaml", "--requeue-by", "exit"], "--requeue-by"),
    ],
)
def test_options_that_do_not_fit_are_refused(recipe, cluster, arguments, named):
    ended = command("launch", recipe, *arguments)
    assert ended.code == 64
    assert len(ended.error_lines) == 1
    assert named in ended.error_lines[0]


def test_the_settings_in_the_document_are_the_ones_that_exist():
    text = (Path(__file__).parents[2] / "docs/kubernetes.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    shown = yaml.safe_load(block)
    assert shown.keys() == ClusterSettings.model_fields.keys()
    ClusterSettings.model_validate(shown)


COMMAND = """
import sys
from dist_cpt.cli import main
try:
    main()
finally:
    print("torch" in sys.modules, "transformers" in sys.modules, "numpy" in sys.modules, file=sys.stderr)
"""


def test_a_dry_run_needs_no_torch(recipe, cluster):
    arguments = ["launch", recipe, "--on", "kubernetes", "--cluster", cluster, "--procs-per-node", "8", "--dry-run"]
    done = subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "kind: TrainJob" in done.stdout
    assert done.stderr.strip() == "False False False"
