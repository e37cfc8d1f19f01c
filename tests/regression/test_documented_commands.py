"""Commands in the documents are accepted by the current programs.

Another project's README had arguments that its code no longer accepted (kvpress #249).
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shlex
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import typer

from skipkv_vllm import cli
from skipkv_vllm.cli import tune
from skipkv_vllm.config import CONFIG_KEY, KVPolicyConfig, RequestOptions
from skipkv_vllm.evaluation import command as evaluation
from skipkv_vllm.policies import policy_names
from skipkv_vllm.training import command as train_gates
from tests.harness import REPOSITORY
from tests.unit.repository.test_deployment import serve_parser  # noqa: F401

DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
PARSERS = {
    "benchmarks.accuracy": "benchmarks.accuracy.__main__",
    "benchmarks.throughput": "benchmarks.throughput.__main__",
    "benchmarks.serving": "benchmarks.serving",
}
"""Module as it is called -> module that has its `_parser`."""
ARGPARSE = {"fidelity": evaluation.make_parser, "tune": tune.make_parser, "train-gates": train_gates.make_parser}
"""Commands of `skipkv` that have their own parser."""
PROGRAMS = [["vllm", "serve"], ["skipkv"], ["make"], *(["python", "-m", module] for module in PARSERS)]
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    """Yield file name and text of the fenced blocks in a language; "" for none."""
    return [
        (str(path.relative_to(REPOSITORY)), text)
        for path in DOCUMENTS
        for kind, text in FENCED.findall(path.read_text())
        if kind == language
    ]


def commands() -> list[tuple[str, list[str]]]:
    """Yield file name and words of every command line, without comments."""
    found = []
    for name, text in blocks(""):
        for line in text.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line, comments=True)
            except ValueError:
                continue  # an output, or the first line of a longer string
            if any(words[: len(program)] == program for program in PROGRAMS):
                found.append((name, words))
    return found


COMMANDS = commands()


def test_there_are_commands_of_every_kind():
    assert all(any(words[: len(program)] == program for _, words in COMMANDS) for program in PROGRAMS)
    assert len(COMMANDS) > 15


def check_skipkv(words: list[str]) -> None:
    """Parse a command line of `skipkv` without running it."""
    if words[0] in ARGPARSE:
        ARGPARSE[words[0]]("skipkv").parse_args(words[1:])
        return
    command: Any = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(words[0] if words else command.name, list(words))


@pytest.mark.parametrize(("name", "words"), COMMANDS, ids=[" ".join(words)[:60] for _, words in COMMANDS])
def test_commands_are_accepted(name: str, words: list[str], serve_parser: Any) -> None:  # noqa: F811
    if words[0] == "vllm":
        arguments = serve_parser.parse_args(words[2:])
        assert arguments.kv_policy in policy_names()
        assert int(arguments.kv_budget) > 0
    elif words[0] == "python":
        importlib.import_module(PARSERS[words[2]])._parser().parse_args(words[3:])
    elif words[0] == "make":
        makefile = (REPOSITORY / "Makefile").read_text()
        targets = [word for word in words[1:] if "=" not in word]
        assert targets
        for target in targets:
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    else:
        check_skipkv(words[1:])


def test_a_wrong_command_is_noticed():
    with pytest.raises(Exception, match="No such option"):
        check_skipkv(["trace", "view", "file", "--opn"])
    with pytest.raises(SystemExit):
        check_skipkv(["train-gates", "--model", "x", "--texts", "y", "--stepz", "1"])


@pytest.fixture
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines, clients and clusters that check their arguments and do nothing."""
    import openai
    import vllm
    from openai.resources.chat.completions import Completions

    engine = inspect.signature(vllm.EngineArgs)
    new_client, create = inspect.signature(openai.OpenAI.__init__), inspect.signature(Completions.create)

    def start(self: Any, model: str, **arguments: Any) -> None:
        engine.bind(model, **arguments)
        self.policy = KVPolicyConfig.model_validate(arguments["additional_config"][CONFIG_KEY])

    # A wrapper names what it wraps, or the start-up check takes it for another plugin's.
    start.__wrapped__ = vllm.LLM.__init__  # type: ignore[attr-defined]

    def generate(self: Any, prompts: Any, params: Any) -> None:
        RequestOptions.parse(params.extra_args, self.policy, 40960)

    class Client:
        def __init__(self, **arguments: Any) -> None:
            new_client.bind(self, **arguments)
            self.chat = SimpleNamespace(completions=self)

        def create(self, **arguments: Any) -> None:
            create.bind(self, **arguments)
            policy = KVPolicyConfig(kv_policy="skipkv")
            assert RequestOptions.parse(arguments["extra_body"]["vllm_xargs"], policy, 4096) != RequestOptions()

    monkeypatch.setattr(vllm.LLM, "__init__", start)
    monkeypatch.setattr(vllm.LLM, "generate", generate)
    monkeypatch.setattr(openai, "OpenAI", Client)
    cluster, llm = ModuleType("ray.serve"), ModuleType("ray.serve.llm")
    cluster.run = lambda app: app
    llm.LLMConfig = lambda **arguments: engine.bind("model", **arguments["engine_kwargs"])
    llm.build_openai_app = dict
    root = ModuleType("ray")
    root.serve, cluster.llm = cluster, llm
    for module in (root, cluster, llm):
        monkeypatch.setitem(sys.modules, module.__name__, module)


PYTHON = blocks("python")


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize(("name", "text"), PYTHON, ids=[f"{name}-{i}" for i, (name, _) in enumerate(PYTHON)])
def test_programs_run(name: str, text: str) -> None:
    exec(compile(text, name, "exec"), {})


def test_requests_on_the_command_line_are_json():
    bodies = [body for _, text in blocks("") for body in re.findall(r"-d '(\{.*?\})'", text, re.DOTALL)]
    assert bodies
    policy = KVPolicyConfig(kv_policy="skipkv")
    for body in bodies:
        RequestOptions.parse(json.loads(body)["vllm_xargs"], policy, 2048)
