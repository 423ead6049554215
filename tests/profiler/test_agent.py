"""The agent alone: what it may be written in, and what a link makes of strange answers."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

from zipc.core.errors import RemoteError
from zipc.profiler import agent, facts, tensorrt_python, trtexec
from zipc.profiler.link import MAX_ANSWER, BadAnswer, Link, LinkLost, checked_facts, checked_times

MODULES = (facts, agent, tensorrt_python, trtexec)
SENT = {m.__name__: Path(str(m.__file__)).read_text() for m in MODULES}


@pytest.mark.parametrize("name", SENT)
def test_the_agent_is_written_in_python_3_8_and_needs_no_package(name: str) -> None:
    tree = ast.parse(SENT[name], feature_version=(3, 8))
    at_the_top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name for n in at_the_top if isinstance(n, ast.Import) for a in n.names}
    names |= {str(n.module) for n in at_the_top if isinstance(n, ast.ImportFrom)}
    assert {n.partition(".")[0] for n in names - SENT.keys()} <= set(sys.stdlib_module_names)
    inside = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names} - names
    lazily = {"numpy", "onnxruntime", "openvino"}
    assert inside == (lazily if name == agent.__name__ else set())


@pytest.mark.parametrize("name", SENT)
def test_the_agent_uses_nothing_that_came_after_python_3_8(name: str) -> None:
    after = ("removeprefix", "removesuffix", "strict=", "functools.cache", "zoneinfo", "match ")
    assert [word for word in after if word in SENT[name]] == []
    called = [n.func for n in ast.walk(ast.parse(SENT[name])) if isinstance(n, ast.Call)]
    assert not any(isinstance(f, ast.Name) and f.id in ("exec", "eval") for f in called)


def other_end(tmp_path: Path, *answers: str, greeting: str | None = None) -> Link:
    """A link to a stranger that reads nothing and says what it was told to."""
    greeting = json.dumps({agent.GREETING: "3.8.0"}) if greeting is None else greeting
    script = tmp_path / "stranger"
    lines = "".join(f"{line}\n" for line in (greeting, *answers))
    (tmp_path / "said").write_text(lines)
    script.write_text(f"#!/bin/sh\ncat {tmp_path}/said; exec cat > /dev/null\n")
    script.chmod(0o755)
    return Link([], python=str(script))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("[" * 100_000, "not JSON"),
        ("no json", "not JSON"),
        ('{"value": 1', "not JSON"),
        ("[]", "no answer"),
        ('{"value": 1, "more": 2}', "no answer"),
        ('{"error": "x"}', "no answer"),
        ("x" * (MAX_ANSWER + 1), "a line of more than"),
    ],
)
def test_an_answer_of_no_agent_is_refused(tmp_path: Path, answer: str, message: str) -> None:
    with pytest.raises(BadAnswer, match=message):
        other_end(tmp_path, answer).ask({"do": "state", "drop": []})


def test_an_error_names_no_class_of_its_own_and_writes_no_control_characters(
    tmp_path: Path,
) -> None:
    link = other_end(tmp_path, json.dumps({"error": "\x1b[2Jboo\n", "kind": "SystemExit"}))
    with pytest.raises(RemoteError, match=r"^\[2Jboo$"):
        link.ask({"do": "state", "drop": []})


def test_a_stranger_that_never_greets_or_ends_is_no_agent(tmp_path: Path) -> None:
    with pytest.raises(BadAnswer, match="prints and prints"):
        other_end(tmp_path, greeting="\n".join(["banner" * 100] * 1000))
    with pytest.raises(LinkLost, match="exit code 0"):
        Link([], python="true")


@pytest.mark.parametrize(
    "found",
    [
        None,
        3,
        [[1.0, 2.0]],
        [[1.0], [1.0]],
        [[1.0, 2.0], [1.0, float("nan")]],
        [[1.0, 2.0], [1.0, -1.0]],
        [[1.0, 2.0], [1.0, 0]],
        [[1.0, 2.0], [1.0, "2"]],
        [[1.0, 2.0], [1.0, True]],
        [[1.0, 2.0], [1.0, 10**400]],
        [[1.0, 2.0], [1.0, 1e308]],
        ["12", "34"],
    ],
)
def test_samples_that_are_none_are_refused(found: object) -> None:
    with pytest.raises(BadAnswer):
        checked_times(found, graphs=2, rounds=2)


def test_facts_are_text_and_numbers_without_control_characters() -> None:
    assert checked_facts({"a\x07": ["b\x1b[0m", 1], "c": {"d": 1.5}}) == {
        "a": ["b [0m", 1],
        "c": {"d": 1.5},
    }
    worked_with = {"cores": 2, "isa": ["avx2"], "cpu_mhz": 2.5, "temperature_c": {"cpu": 50}}
    assert checked_facts(worked_with) == worked_with
    for strange in (
        *(None, [], {"a": None}, {"a": float("inf")}, {"a": 10**400}),
        *({"cores": "two"}, {"cores": True}, {"cpu_mhz": "fast"}, {"isa": "avx2"}, {"isa": [1]}),
        *({"temperature_c": {"cpu": "hot"}}, {"state": {"load_average": 1}}),
    ):
        with pytest.raises(BadAnswer):
            checked_facts(strange)
