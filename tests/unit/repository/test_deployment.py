"""Images, compose, Prometheus, Grafana and the operations handbook agree with the code and with each other."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import yaml
from vllm.v1.metrics import loggers

from skipkv_vllm.integration import metrics, metrics_page
from skipkv_vllm.integration.compat import version as version_check
from skipkv_vllm.ops import native

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
ALERTS = (DOCS / "operations" / "alerts.md").read_text()
METRICS = (DOCS / "reference" / "metrics.md").read_text()
ERRORS = (DOCS / "reference" / "errors.md").read_text()
ENVIRONMENT = (DOCS / "reference" / "environment.md").read_text()
HANDBOOK = "".join(path.read_text() for path in sorted((DOCS / "operations").glob("*.md"))) + ERRORS + METRICS
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "skipkv.json").read_text())
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
PROMETHEUS = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
RULES = [
    rule for group in yaml.safe_load((ROOT / "deploy" / "alerts.yml").read_text())["groups"] for rule in group["rules"]
]
SERVERS = ("vllm", "vllm-cpu")


# ---- exported metrics


@pytest.fixture(scope="module")
def exported() -> dict[str, str]:
    """Return the type of each of our metrics by name."""
    registry = prometheus_client.CollectorRegistry()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("Counter", "Gauge"):
            original = getattr(prometheus_client, name)
            patch.setattr(metrics, name, lambda *a, _of=original, **k: _of(*a, registry=registry, **k))
        metrics._make_metrics()
    return {m.name + ("_total" if m.type == "counter" else ""): m.type for m in registry.collect()}


@pytest.fixture(scope="module")
def known(exported) -> set[str]:
    """Return every series that a rule or a panel may query."""
    source = Path(loggers.__file__).read_text()
    of_vllm = re.findall(r"_(counter|gauge|histogram)_cls\(\s*name=\"(vllm:\w+)\"", source)
    assert len(of_vllm) > 20
    endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    return {"up", *exported, *(name + ending for kind, name in of_vllm for ending in endings[kind])}


def skip_reasons() -> set[str]:
    source = "".join(path.read_text() for path in (ROOT / "skipkv_vllm").rglob("*.py"))
    return set(re.findall(r"\.skipped\(\"(\w+)\"\)", source))


def expressions() -> Iterator[tuple[str, str]]:
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


EXPRESSIONS = list(expressions())


def series(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:skipkv_\w+|vllm:\w+|up)\b", expression))


@pytest.mark.parametrize(("where", "expression"), EXPRESSIONS, ids=[where for where, _ in EXPRESSIONS])
def test_rules_and_panels_ask_for_series_that_exist(where, expression, known):
    assert series(expression), f"{where} queries nothing"
    assert series(expression) <= known


@pytest.mark.parametrize(("where", "expression"), EXPRESSIONS, ids=[where for where, _ in EXPRESSIONS])
def test_rules_and_panels_are_promql(where, expression):
    parser = pytest.importorskip("promql_parser", reason="scripts/bootstrap.sh dev installs promql-parser")
    parser.parse(expression.replace("$__rate_interval", "1m"))


def test_every_metric_is_on_the_dashboard_and_in_the_handbook(exported):
    shown = set().union(*(series(target["expr"]) for p in DASHBOARD["panels"] for target in p.get("targets", ())))
    rows = dict(re.findall(r"^\| `(skipkv_\w+)` \| (counter|gauge) \|", METRICS, re.MULTILINE))
    assert set(exported) <= shown
    assert rows == exported


def test_every_reason_is_in_the_handbook_and_every_reason_in_a_rule_exists():
    reasons = skip_reasons()
    assert len(reasons) >= 3
    assert reasons == set(metrics_page.SKIP_REASONS)
    asked = {reason for _, expression in EXPRESSIONS for reason in re.findall(r'reason="(\w+)"', expression)}
    assert asked
    assert asked <= reasons


# ---- alerts and dashboard


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_it_means_and_what_to_do(rule):
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert rule["annotations"]["runbook"] == f"docs/operations/alerts.md#{rule['alert'].lower()}"
    section = re.search(rf"^## {rule['alert']}\n+(.+)", ALERTS, re.MULTILINE)
    assert section is not None, f"no section about {rule['alert']}"
    assert len(section[1]) > 20


def test_sections_about_alerts_have_an_alert():
    assert set(re.findall(r"^## (\w+)$", ALERTS, re.MULTILINE)) == {rule["alert"] for rule in RULES}


def test_panels_do_not_overlap_and_explain_themselves():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or panel["description"]


def test_the_dashboard_uses_the_data_source_that_is_provisioned():
    folder = ROOT / "deploy" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())["datasources"]
    used = set(re.findall(r'"uid": "(\w+)"', json.dumps(DASHBOARD["panels"])))
    assert used == {source["uid"]}
    host, _, port = source["url"].removeprefix("http://").partition(":")
    assert COMPOSE["services"][host]["ports"][0].endswith(f":{port}")
    (provider,) = yaml.safe_load((folder / "dashboards" / "skipkv.yml").read_text())["providers"]
    mounts = [volume.split(":")[1] for volume in COMPOSE["services"]["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounts


# ---- compose


def test_compose_follows_the_specification():
    if importlib.util.find_spec("check_jsonschema") is None:
        pytest.skip("scripts/bootstrap.sh dev installs check-jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(ROOT / "docker-compose.yml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_mounted_files_and_volumes_exist():
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], volume


def test_ports_are_not_open_to_the_network_by_default():
    for name, service in COMPOSE["services"].items():
        for port in service["ports"]:
            assert port.startswith("${BIND:-127.0.0.1}:"), name


def test_prometheus_finds_the_server_and_its_rules():
    (job,) = PROMETHEUS["scrape_configs"]
    host, _, port = job["static_configs"][0]["targets"][0].partition(":")
    assert job["job_name"] in next(rule["expr"] for rule in RULES if rule["alert"] == "ServerDown")
    for name in SERVERS:
        service = COMPOSE["services"][name]
        aliases = [name, *(service.get("networks", {}).get("default", {}).get("aliases", ()))]
        assert host in aliases
        assert service["ports"][0].endswith(f":{port}")
    mounts = dict(volume.split(":")[:2] for volume in COMPOSE["services"]["prometheus"]["volumes"])
    assert mounts["./deploy/alerts.yml"] == f"/etc/prometheus/{PROMETHEUS['rule_files'][0]}"


@pytest.fixture(scope="module")
def serve_parser() -> Any:
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ModuleNotFoundError:
        from vllm.entrypoints.common.cli_args import make_arg_parser  # since vLLM 0.33
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from skipkv_vllm.plugin import register

    register()
    return make_arg_parser(FlexibleArgumentParser())


@pytest.mark.parametrize("name", SERVERS)
def test_commands_are_arguments_of_vllm_serve(name, serve_parser):
    service = COMPOSE["services"][name]
    words = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in service["command"]]
    arguments = serve_parser.parse_args(words)
    assert arguments.model_tag == words[0]
    assert arguments.kv_policy == "skipkv"
    assert int(arguments.kv_budget) > 0
    assert service["build"]["target"] in stages()


# ---- images


def stages() -> dict[str, str]:
    """Return the base of each stage of the Dockerfile."""
    return {name: base for base, name in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)}


def test_the_dockerfile_is_clean():
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("scripts/bootstrap.sh dev installs hadolint on Linux x86_64")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_images_have_the_vllm_that_was_tested():
    tested = [version_check.record_of(each)["vllm"] for each in version_check.supported()]
    assert stages()["cuda"] == stages()["build-cuda"] == f"vllm/vllm-openai:v{tested[-1]}"
    bootstrap = (ROOT / "scripts" / "bootstrap.sh").read_text()
    assert f"VLLM_VERSION_CUDA={tested[-1]}\n" in bootstrap
    found = re.search(r"^VLLM_VERSION_CPU=(\S+)", bootstrap, re.MULTILINE)
    assert found is not None
    assert found[1] == version_check.NEWEST_FOR_CPUS
    assert found[1] in tested
    assert DOCKERFILE.count("check_sources()") == 2, "each image must run the check"


def test_the_image_contains_what_the_build_reads():
    ignored = (ROOT / ".dockerignore").read_text().split()
    for needed in ("csrc", "pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in", "scripts", "packaging"):
        assert (ROOT / needed).exists()
        assert needed not in ignored
    model = re.search(r'CMD \["/app/([^"]+)"', DOCKERFILE)
    assert model is not None
    assert (ROOT / model[1] / "config.json").exists()


# ---- the handbook


def test_environment_variables_are_in_the_handbook():
    files = [*(ROOT / "skipkv_vllm").rglob("*.py"), ROOT / "setup.py", ROOT / "scripts" / "bootstrap.sh"]
    read = r'(?:environ(?:\.get)?[(\[]|OVERRIDE = |\$\{)"?(SKIPKV_\w+)'
    names = {name for path in files for name in re.findall(read, path.read_text())} | set(native.OVERRIDES.values())
    assert {version_check.OVERRIDE, "SKIPKV_OPS", "SKIPKV_DEVICE"} <= names
    assert {name for name in names if f"`{name}`" in ENVIRONMENT} == names


def test_flags_in_the_handbook_and_the_alerts_exist(serve_parser):
    known = {option for action in serve_parser._actions for option in action.option_strings}
    of_others = {"--gpus", "--shm-size", "--cap-add", "--target", "--profile", "--no-build-isolation"}
    of_check = {"--architecture", "--out", "--only-most-important", "--steps", "--total", "--tiny"}
    of_others |= {"--open", "--patched"}
    of_others |= {"--full", "--only", "--list", "--patience"}  # of scripts/gpu_test.sh
    text = HANDBOOK + json.dumps(RULES)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known | of_others | of_check


def test_messages_that_the_handbook_explains_exist():
    sources = "".join(path.read_text() for path in (ROOT / "skipkv_vllm").rglob("*.py"))
    for phrase in (
        "this vLLM differs from the",
        "was replaced by",
        "does not support",
        "given without --kv-policy",
        "cannot be combined with",
        "which is slow",
        "scheduler and worker disagree about",
    ):
        assert phrase in ERRORS
        assert phrase in sources
