"""What `mneme launch` writes, against the schemas of those who read it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import (
    TrainerV1alpha1TrainingRuntime,
)

from launch.cli import main
from launch.cluster import kubeflow, kubernetes, slurm, volcano
from launch.cluster.spec import LaunchSpec, make_spec, problems
from launch.compose import compose
from train.recipe import from_plain, load_resolved

KUBERNETES = "1.34"
NANO = ["parallel.backend=cuda", "launch.nodes=2", "cluster.cpus_per_node=16"]
PODS = [*NANO, "cluster.image=registry/mneme:1", "cluster.volume_claim=shared"]


def make(*overrides: str) -> LaunchSpec:
    return make_spec(compose("v4_nano", overrides).config, "/data/runs/v4_nano-1", "/data")


def documents(text: str) -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def pod_of(job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = job["spec"]["template"]["spec"]
    return found


def test_the_batch_script_is_the_one_that_a_person_has_read() -> None:
    text = slurm.render(make(*NANO, "cluster.queue=big", "cluster.setup=[module load cuda]"))
    golden = Path(__file__).parent / "v4_nano.sbatch"
    lines = text.splitlines()
    [python] = [line for line in lines if line.startswith("python=")]
    assert text.replace(python, "python=/opt/mneme/bin/python") == golden.read_text()


@pytest.mark.parametrize("value", ["plain", "two words", 'it\'s $HOME `x` "q"', "a\\b"])
def test_a_shell_reads_the_batch_script_and_what_a_recipe_puts_into_it(value: str) -> None:
    spec = make(*NANO)
    text = slurm.render(replace(spec, cluster=replace(spec.cluster, env={"NOTE": value})))
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    [line] = [line for line in text.splitlines() if "NOTE=" in line]
    said = subprocess.run(
        ["bash", "-c", f'{line}; printf %s "$NOTE"'], capture_output=True, text=True, check=True
    )
    assert said.stdout == value


def test_directives_come_first_and_quote_their_paths() -> None:
    config = compose("v4_nano", NANO).config
    text = slurm.render(make_spec(config, "/shared/100% two", "/home/a b"))
    lines = text.splitlines()
    last = max(index for index, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[:last])
    assert '#SBATCH --output="/shared/100%% two/logs/slurm-%j.log"' in lines
    assert '#SBATCH --chdir="/home/a b"' in lines


def test_kubernetes_takes_the_manifests() -> None:
    found = documents(kubernetes.render(make(*PODS)))
    assert list(found) == ["ConfigMap", "Service", "Job"]
    for document in found.values():
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    job = found["Job"]
    with pytest.raises(kubernetes_validate.ValidationError):  # the validation sees such mistakes
        kubernetes_validate.validate(job | {"spec": {"competions": 2}}, KUBERNETES, strict=True)
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (2, 2)
    service, pod = found["Service"], pod_of(job)
    assert pod["subdomain"] == service["metadata"]["name"]
    [container] = pod["containers"]
    assert f"--endpoint={job['metadata']['name']}-0.{pod['subdomain']}:29400" in container["args"]
    assert container["resources"]["limits"] == {"cpu": "16", "nvidia.com/gpu": "2"}


def test_exit_codes_decide_what_kubernetes_does() -> None:
    rules = documents(kubernetes.render(make(*PODS)))["Job"]["spec"]["podFailurePolicy"]["rules"]
    by_code = {
        code: rule["action"]
        for rule in rules
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert by_code == {1: "FailJob", 2: "FailJob", 86: "FailJob", 85: "Ignore"}


def test_the_recipe_travels_with_the_pods(tmp_path: Path) -> None:
    config = compose("v4_nano", PODS).config
    recipe = documents(kubernetes.render(make(*PODS)))["ConfigMap"]["data"]["recipe.yaml"]
    assert from_plain(yaml.safe_load(recipe)) == config
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert load_resolved(tmp_path / "recipe.yaml") == config


def test_kubeflow_keeps_every_field_of_the_manifests() -> None:
    """Its models drop what they do not know, so a field that comes back is one of theirs."""
    found = documents(kubeflow.render(make(*PODS)))
    assert list(found) == ["ConfigMap", "TrainingRuntime", "TrainJob"]
    job, runtime = found["TrainJob"], found["TrainingRuntime"]
    read_job = TrainerV1alpha1TrainJob.from_dict(job)
    read_runtime = TrainerV1alpha1TrainingRuntime.from_dict(runtime)
    assert read_job is not None
    assert read_runtime is not None
    assert read_job.to_dict() == job
    assert read_runtime.to_dict() == runtime
    job["spec"]["trainer"]["numNodez"] = 2
    dropped = TrainerV1alpha1TrainJob.from_dict(job)
    assert dropped is not None
    assert dropped.to_dict() != job
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]


_ACTIONS = {"AbortJob", "RestartJob", "RestartTask", "TerminateJob", "CompleteJob", "ResumeJob"}
_EVENTS = {"PodFailed", "PodEvicted", "Unknown", "TaskCompleted", "OutOfSync", "CommandIssued", "*"}
_VOLCANO = {
    "minAvailable": int,
    "schedulerName": str,
    "plugins": dict,
    "policies": list,
    "maxRetry": int,
    "queue": str,
    "tasks": list,
}
"""Fields of a Job's spec that we use, by Volcano's documentation of batch.volcano.sh/v1alpha1."""


def test_volcano_knows_every_field_of_the_manifest() -> None:
    overrides = [*PODS, "parallel.backend=ascend", "cluster.queue=big"]
    found = documents(volcano.render(make(*overrides)))
    job = found["Job"]
    assert (job["apiVersion"], job["kind"]) == ("batch.volcano.sh/v1alpha1", "Job")
    assert job["spec"].keys() == _VOLCANO.keys()
    assert all(isinstance(job["spec"][name], kind) for name, kind in _VOLCANO.items())
    for policy in job["spec"]["policies"]:
        assert policy["action"] in _ACTIONS
        assert ("event" in policy) != ("exitCode" in policy)
        assert policy.get("event", "*") in _EVENTS
        assert policy.get("exitCode", 1) != 0
    [task] = job["spec"]["tasks"]
    assert task.keys() == {"name", "replicas", "template"}
    assert job["spec"]["minAvailable"] == task["replicas"] == 2
    # The pod is a plain one: Kubernetes' own schema knows it.
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **task["template"]}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    [container] = task["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["huawei.com/Ascend910"] == "2"
    name = job["metadata"]["name"]
    assert f"--endpoint={name}-node-0.{name}:29400" in container["args"]


@pytest.mark.parametrize(
    ("platform", "overrides", "said"),
    [
        ("slurm", [], "parallel.backend=auto: the cluster must be asked for devices by name"),
        ("slurm", ["parallel.backend=cpu"], "cluster.cpus_per_node=null: Slurm gives"),
        ("k8s", ["parallel.backend=cuda"], "cluster.image=null: --on k8s needs the image"),
        ("k8s", ["parallel.backend=cuda"], "cluster.volume_claim=null: pods need a volume"),
        (
            "slurm",
            ["parallel.backend=cuda", "cluster.accelerators_per_node=2"],
            "launch.nodes=1: leaves 4 ranks on a node, which has cluster.accelerators_per_node=2; "
            "use launch.nodes=2",
        ),
        (
            "slurm",
            ["parallel.backend=cpu", "cluster.time_limit_minutes=3"],
            "use cluster.time_limit_minutes=4 or more",
        ),
    ],
)
def test_what_a_cluster_cannot_do_is_refused(
    platform: Any, overrides: list[str], said: str
) -> None:
    found = list(problems(compose("v4_nano", overrides).config, platform))
    assert any(said in line for line in found), found


def test_several_problems_are_reported_at_once_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "v4_nano", "--on", "k8s"]) == 2
    error = capsys.readouterr().err
    for key in ("parallel.backend=auto", "cluster.image=null", "cluster.volume_claim=null"):
        assert key in error
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit) as left:
        main(["launch", "v4_nano", "--on", "pbs"])
    assert left.value.code == 2
    assert "invalid choice: 'pbs'" in capsys.readouterr().err


def test_a_dry_run_prints_a_file_prepares_nothing_and_needs_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from launch.cli import main\n"
        f"code = main(['launch', 'v4_nano', '--on', 'k8s', '--dry-run', *{PODS!r}])\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert list(documents(done.stdout)) == ["ConfigMap", "Service", "Job"]
    assert list(tmp_path.iterdir()) == []


def test_without_the_tool_that_submits_a_file_is_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert main(["launch", "v4_nano", "--on", "volcano", *PODS]) == 2
    assert (
        "kubectl is not installed here; type this where it is, or add -o" in capsys.readouterr().err
    )
    assert main(["launch", "v4_nano", "--on", "volcano", "-o", "job.yaml", *PODS]) == 0
    assert list(documents(Path("job.yaml").read_text())) == ["ConfigMap", "Job"]
    assert "kubectl apply -f job.yaml" in capsys.readouterr().out


def test_settings_without_a_meaning_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", "v4_nano", "--on", "k8s", "--dry-run", *PODS, "cluster.account=me"]
    assert main(words) == 0
    assert "cluster.account: has no meaning with --on k8s" in capsys.readouterr().err
