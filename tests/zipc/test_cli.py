"""The command line: strings to a request, outcomes to exit codes, nothing but JSON on stdout."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from tests import relu_graph
from tests.command_line import Run
from zipc import gate
from zipc.cli.bench import pairs_within
from zipc.cli.printing import show_manifest
from zipc.cli.progress import Lines, open_progress
from zipc.cli.quantities import parse_seconds
from zipc.cli.running import RESUMABLE, UNCHANGED
from zipc.core.errors import NoisyMeasurement, TargetUnreachable, UsageError
from zipc.core.figures import three_digits
from zipc.core.request import Request
from zipc.core.types import (
    Allocation,
    Artifact,
    InputSpec,
    LeftAlone,
    Level,
    Progress,
    Site,
    Workload,
)
from zipc.manifest import (
    AllocationRecord,
    LatencyRecord,
    Manifest,
    ModelRecord,
    QualityRecord,
    RequestRecord,
    SizeRecord,
)

ROOT = Path(__file__).parents[2]
SHA = "ab" * 32
COMPILE = ["compile", "minilm", "--speedup", "2x", "--data", "d", "-o", "OUT"]


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A pipeline whose functions the test sets; requests it was given lie in `requests`."""
    module: Any = ModuleType("zipc.pipeline")
    module.requests = []
    module.compile_model = answer(module, lambda: manifest())
    monkeypatch.setitem(sys.modules, "zipc.pipeline", module)
    return module


@pytest.fixture
def profiling(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`zipc.profiling` that measures nothing; requests it was given lie in `requests`."""
    module: Any = ModuleType("zipc.profiling")
    module.requests = []
    module.profile_model = answer(module, FakeProfile)
    monkeypatch.setitem(sys.modules, "zipc.profiling", module)
    return module


def answer(module: Any, result: Callable[[], Any]) -> Callable[..., Any]:
    def function(request: Request, *, progress: Progress) -> Any:
        module.requests.append(request)
        progress.stage("search", total=2)
        progress.advance()
        print("noise of a library")
        progress.done()
        return result()

    return function


def manifest(**changes: Any) -> Manifest:
    made = Manifest(
        target="cpu",
        workload=Workload(),
        model=ModelRecord(source="minilm", sha256=SHA),
        request=RequestRecord(model="minilm", speedup=2.0),
        allocation=(AllocationRecord(site="layer.0.ffn", level=Level(512), units=1536),),
        latency=LatencyRecord(
            table_kind="measured",
            reference_ms=20.0,
            compiled_ms=9.8,
            predicted_ms=9.7,
            speedup=2.04,
            speedup_ci95=(2.01, 2.07),
            pairs=200,
        ),
        verdict="validated",
        quality=QualityRecord(metric="spearman", split="test", dense=82.03, compiled=81.53),
        size=SizeRecord(dense_mb=90.0, compiled_mb=24.0),
        files=(Artifact("reference.onnx", "reference", SHA),),
        timings_s={"search": 12.0},
        seed=0,
        versions={},
    )
    return made.model_copy(update=changes)


def failing(error: BaseException) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


class TestCompile:
    def test_every_flag_reaches_the_request(self, run: Run, pipeline: Any) -> None:
        code, _, _ = run(
            *("compile", "m", "--latency", "5ms", "--data", "d", "-o", "o", "--target", "cpu"),
            *("--metric", "pearson", "--eval", "f.py:g", "--text-column", "a"),
            *("--text-column", "b", "--label-column", "c", "--precision", "int8", "--no-prune"),
            *("--include", "x*", "--exclude", "y*", "--effort", "quick", "--seed", "7"),
            *("--threads", "2", "--batch-size", "4", "--sequence-length", "64"),
            *("--weights", "w.safetensors", "--input-shapes", "x:4x3,ids:4x7:int64"),
            *("--cache-dir", "k", "--no-reference", "--allow-table-mismatch"),
            *("--require", "validated", "--recover", "none"),
        )
        assert code == 0
        assert pipeline.requests == [
            Request(
                model="m",
                data="d",
                output=Path("o"),
                latency_ms=5.0,
                numerics="int8",
                prune=False,
                metric="pearson",
                evaluator="f.py:g",
                text_columns=("a", "b"),
                label_column="c",
                include=("x*",),
                exclude=("y*",),
                effort="quick",
                seed=7,
                threads=2,
                batch_size=4,
                sequence_length=64,
                weights="w.safetensors",
                input_shapes=(
                    InputSpec("x", "float32", (4, 3)),
                    InputSpec("ids", "int64", (4, 7)),
                ),
                cache_dir=Path("k"),
                keep_reference=False,
                allow_table_mismatch=True,
                require="validated",
            )
        ]

    def test_input_shapes_may_be_given_one_by_one(self, run: Run, pipeline: Any) -> None:
        flags = ("--input-shapes", "x:4x3", "--input-shapes", "ids:4x7:int64")
        assert run(*COMPILE, *flags)[0] == 0
        assert [s.name for s in pipeline.requests[0].input_shapes] == ["x", "ids"]
        code, _, err = run(*COMPILE, *flags, "--input-shapes", "x:1x2")
        assert (code, "gives x twice" in err) == (2, True)

    def test_defaults_are_those_of_the_request(self, run: Run, pipeline: Any) -> None:
        run(*COMPILE)
        assert pipeline.requests == [
            Request(model="minilm", data="d", output=Path("OUT"), speedup=2.0)
        ]

    @pytest.mark.parametrize(
        ("verdict", "flags", "code"),
        [
            ("validated", (), 0),
            ("missed", (), 1),
            ("inconclusive", (), 3),
            ("predicted", (), 0),
            ("predicted", ("--require", "validated"), 1),
            ("validated", ("--require", "validated"), 0),
        ],
    )
    def test_verdict_becomes_the_exit_code(
        self, run: Run, pipeline: Any, verdict: str, flags: tuple[str, ...], code: int
    ) -> None:
        pipeline.compile_model = answer(pipeline, lambda: manifest(verdict=verdict))
        assert run(*COMPILE, *flags)[0] == code

    def test_report_says_speedup_quality_size_and_what_next(self, run: Run, pipeline: Any) -> None:
        _, out, err = run(*COMPILE)
        assert "validated  2.04x (95 % interval 2.01 to 2.07, 200 pairs), asked 2x" in out
        assert "reference 20.0 ms, compiled 9.80 ms" in out
        assert "dense 82.03, compiled 81.53 (-0.50)" in out
        assert "90.0 MB to 24.0 MB" in out
        assert "512/1536" in out
        assert "next: zipc bench OUT" in out
        assert "noise of a library" in err
        assert "noise" not in out

    def test_report_says_where_less_is_better(self, run: Run, pipeline: Any) -> None:
        quality = QualityRecord(
            metric="loss", split="test", dense=1.2664, compiled=1.3001, interval=(0.03, 0.0401)
        )
        pipeline.compile_model = answer(pipeline, lambda: manifest(quality=quality))
        expected = "dense 1.2664, compiled 1.3001 (+0.0337, 95 % +0.0300 to +0.0401), lower is"
        assert expected in run(*COMPILE)[1]

    def test_brackets_in_names_are_printed_as_they_are(self, run: Run, pipeline: Any) -> None:
        model = ModelRecord(source="models/[v2]", sha256=SHA)
        pipeline.compile_model = answer(pipeline, lambda: manifest(model=model))
        assert "models/[v2]" in run(*COMPILE)[1]

    def test_json_is_the_manifest_and_nothing_else(self, run: Run, pipeline: Any) -> None:
        code, out, _ = run(*COMPILE, "--format", "json")
        assert code == 0
        assert json.loads(out) == json.loads(json.dumps(manifest().to_json()))

    def test_without_data_says_what_is_needed_and_why(self, run: Run, pipeline: Any) -> None:
        code, out, err = run("compile", "minilm", "--speedup", "2x", "-o", "OUT")
        assert (code, out) == (2, "")
        assert "compile needs --data" in err
        assert "what can be removed" in err
        assert pipeline.requests == []

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("compile", "m", "--data", "d", "-o", "o"), "--latency 5ms or --max-drop 0.5"),
            (("plan", "m", "--data", "d"), "Give --speedup 2x or --latency 5ms (--no-prune"),
            ((*COMPILE, "--latency", "5ms"), "give one"),
            (("compile", "m", "--speedup", "2x", "--data", "d"), "Give a folder: -o OUT"),
            (("compile", "m", "--speedup", "two", "--data", "d", "-o", "o"), "Did you mean 2x?"),
            (("compile",), "Missing argument"),
            ((*COMPILE, "--numerics", "int3"), "int3"),
            ((*COMPILE, "--threads", "0"), "--threads"),
            ((*COMPILE, "--colour", "red"), "--colour"),
            (("compress", "m"), "compress"),
        ],
    )
    def test_bad_usage_is_one_message_and_code_2(
        self, run: Run, pipeline: Any, arguments: tuple[str, ...], said: str
    ) -> None:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert said in err
        assert "Traceback" not in err

        code, out, _ = run(*arguments, "--format", "json")
        error = json.loads(out)["error"]
        assert code == error["exit_code"] == 2
        assert said in error["message"]

    def test_no_prune_needs_no_speedup(self, run: Run, pipeline: Any) -> None:
        assert run("compile", "m", "--no-prune", "--data", "d", "-o", "o")[0] == 0

    def test_dry_run_reads_the_data_and_builds_nothing(
        self, run: Run, pipeline: Any, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        arguments = ("compile", "m", "--speedup", "2x", "--data", str(ROOT / "examples/stsb"))
        code, text, _ = run(*arguments, "-o", str(out), "--dry-run", "--format", "json")
        document = json.loads(text)
        assert code == 0
        assert document["request"]["speedup"] == 2.0
        assert "sentence1" in document["data"]
        assert pipeline.requests == []
        assert not out.exists()

    @pytest.mark.parametrize(
        ("flags", "told"),
        [
            (["-o", "mine"], "mine is not empty and was not written by zipc"),
            (["-o", "mine/thesis.tex"], "thesis.tex is a file"),
            (["-o", "mine/thesis.tex/out"], "Cannot write to "),
            (["-o", "out", "--metric", "acuracy"], "Did you mean 'accuracy'?"),
        ],
    )
    def test_dry_run_refuses_what_the_run_would(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], told: str
    ) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/thesis.tex").write_text("mine")
        monkeypatch.chdir(tmp_path)
        data = ("--data", str(ROOT / "examples/stsb"))
        code, _, err = run("compile", "m", "--speedup", "2x", *data, *flags, "--dry-run")
        assert (code, told in " ".join(err.split())) == (2, True)
        assert [p.name for p in tmp_path.rglob("*")] == ["mine", "thesis.tex"]

    @pytest.mark.parametrize("shapes", [[], ["--input-shapes", "x:1x4"]])
    def test_dry_run_refuses_rows_that_are_not_finite(
        self, run: Run, tmp_path: Path, shapes: list[str]
    ) -> None:
        rows = np.ones((64, 4))
        rows[3, 2] = np.nan
        np.savez(tmp_path / "rows.npz", x=rows)
        data = ("--data", str(tmp_path / "rows.npz"))
        code, _, err = run(
            "compile", "m", "--speedup", "2x", *data, *shapes, "-o", "o", "--dry-run"
        )
        assert code == 2
        assert "NaN or infinity in 1 of 64 rows, the first of them row 3" in " ".join(err.split())

    def test_dry_run_misses_what_is_not_installed(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "modelopt", None)
        code, _, err = run(*COMPILE, "--quantizer", "modelopt", "--dry-run")
        assert (code, "pip install 'zipc[modelopt]'" in err) == (2, True)


class TestFailures:
    def test_zipc_error_is_its_message_and_code(self, run: Run, pipeline: Any) -> None:
        pipeline.compile_model = answer(pipeline, failing(NoisyMeasurement("too noisy; go")))
        code, out, err = run(*COMPILE)
        assert (code, out) == (3, "")
        assert err.endswith("zipc: too noisy; go\n")
        assert "Traceback" not in err

    def test_unreachable_target_states_the_best_speedup(self, run: Run, pipeline: Any) -> None:
        error = TargetUnreachable("at most 4.1x", best_speedup=4.1)
        pipeline.compile_model = answer(pipeline, failing(error))
        code, out, _ = run(*COMPILE, "--format", "json")
        assert code == 1
        assert json.loads(out)["error"] == {
            "type": "TargetUnreachable",
            "message": "at most 4.1x",
            "exit_code": 1,
            "best_speedup": 4.1,
        }

    @pytest.mark.parametrize("form", ["table", "json"])
    def test_a_bug_keeps_its_traceback_and_is_not_a_regression(
        self, run: Run, pipeline: Any, form: str
    ) -> None:
        pipeline.compile_model = answer(pipeline, failing(KeyError("layer")))
        code, out, err = run(*COMPILE, "--format", form)
        assert code == 70
        assert "Traceback" in err
        assert "KeyError: 'layer'" in err
        if form == "json":
            assert json.loads(out)["error"]["type"] == "KeyError"

    def test_ctrl_c_is_one_line_and_130(self, run: Run, pipeline: Any) -> None:
        pipeline.compile_model = answer(pipeline, failing(KeyboardInterrupt()))
        code, out, err = run(*COMPILE)
        assert (code, out) == (130, "")
        assert err.endswith(RESUMABLE + "\n")
        assert "Traceback" not in err

    def test_only_what_keeps_stages_says_that_it_resumes(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def stop(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(gate, "check", stop)
        monkeypatch.setattr("zipc.cli.compile.dry_run", stop)
        for words in (("check", "a.onnx", "--baseline", "b.onnx"), (*COMPILE, "--dry-run")):
            code, out, err = run(*words, "--format", "json")
            assert (code, json.loads(out)["error"]["message"]) == (130, UNCHANGED)
            assert err.endswith(UNCHANGED + "\n")

    @pytest.mark.parametrize(
        "make", [lambda: np.empty((1 << 50, 1 << 8)), lambda: torch.empty(1 << 50, 1 << 8)]
    )
    def test_too_little_memory_is_one_message_that_says_what_to_do(
        self, run: Run, pipeline: Any, make: Callable[[], Any]
    ) -> None:
        pipeline.compile_model = answer(pipeline, make)
        code, out, err = run(*COMPILE)
        assert (code, out) == (2, "")
        assert "Give a smaller batch or shorter inputs" in err
        assert "Traceback" not in err
        code, out, _ = run(*COMPILE, "--format", "json")
        error = json.loads(out)["error"]
        assert (code, error["exit_code"]) == (2, 2)
        assert "more memory" in error["message"]

    def test_sigterm_unwinds_and_is_143(self, run: Run, pipeline: Any) -> None:
        tidied = []

        def terminated() -> Any:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
            finally:
                tidied.append(True)

        before = signal.getsignal(signal.SIGTERM)
        pipeline.compile_model = answer(pipeline, terminated)
        code, out, _ = run(*COMPILE, "--format", "json")
        assert code == json.loads(out)["error"]["exit_code"] == 143
        assert tidied == [True]
        assert signal.getsignal(signal.SIGTERM) is before


class TestStandardOutput:
    """What a shell may do to stdout does not change what the exit code means."""

    def zipc(self, *words: str, shell: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = shlex.join([sys.executable, "-m", "zipc", *words])
        return subprocess.run(
            ["bash", "-o", "pipefail", "-c", shell.format(command)],
            cwd=ROOT,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
        )

    def test_letters_the_encoding_lacks_become_question_marks(self, tmp_path: Path) -> None:
        manifest(model=ModelRecord(source="modèle · 2×", sha256=SHA)).write(tmp_path)
        ran = self.zipc(
            "inspect", str(tmp_path / "manifest.json"), shell="{}", PYTHONIOENCODING="ascii"
        )
        assert ran.returncode == 0
        assert "mod?le ? 2?" in ran.stdout

    @pytest.mark.parametrize("form", ["table", "json"])
    def test_a_reader_that_stops_early_is_no_failure(self, tmp_path: Path, form: str) -> None:
        made = manifest(left_alone=tuple(LeftAlone(f"part {i}", "x" * 90) for i in range(2000)))
        made.write(tmp_path)
        words = ("inspect", str(tmp_path / "manifest.json"), "--format", form)
        ran = self.zipc(*words, shell="{} | head -1 >/dev/null")
        assert (ran.returncode, ran.stdout) == (0, "")
        assert "Traceback" not in ran.stderr
        assert "rror" not in ran.stderr

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
    @pytest.mark.parametrize("form", ["table", "json"])
    def test_a_full_disk_is_one_message(self, tmp_path: Path, form: str) -> None:
        manifest().write(tmp_path)
        ran = self.zipc(
            "inspect", str(tmp_path / "manifest.json"), "--format", form, shell="{} > /dev/full"
        )
        assert ran.returncode == 2
        assert ran.stderr.splitlines()[-1].startswith("zipc: cannot write to standard output")
        assert "Traceback" not in ran.stderr

    def test_a_closed_stream_is_written_nothing(self, tmp_path: Path) -> None:
        manifest().write(tmp_path)
        assert (
            self.zipc("inspect", str(tmp_path / "manifest.json"), shell="{} >&- 2>&-").returncode
            == 0
        )

    def test_lines_end_where_their_text_does(self, run: Run, tmp_path: Path) -> None:
        manifest().write(tmp_path)
        _, out, _ = run("inspect", str(tmp_path / "manifest.json"))
        assert not [line for line in out.splitlines() if line != line.rstrip()]


def test_names_of_sites_stay_whole_on_a_narrow_terminal() -> None:
    console = Console(file=io.StringIO(), width=36)
    names = [f"encoder.layer.{i}.attention.self" for i in range(3)]
    records = tuple(AllocationRecord(site=name, level=Level(4), units=12) for name in names)
    show_manifest(console, manifest(allocation=records), out=Path("OUT"))
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert "…" not in printed
    folded = "".join(line.split(" ")[0] for line in printed.splitlines())
    assert all(name in folded for name in names)


def printed(made: Manifest) -> str:
    console = Console(file=io.StringIO(), width=120)
    show_manifest(console, made, out=Path("OUT"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_times_of_small_networks_stay_apart() -> None:
    times = {"reference_ms": 0.0237, "compiled_ms": 0.0163, "p90_ms": 0.0171, "p99_ms": 0.0204}
    shown = printed(manifest(latency=manifest().latency.model_copy(update=times)))
    assert "reference 0.0237 ms, compiled 0.0163 ms (p90 0.0171, p99 0.0204)" in shown


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.00021234, "0.000212"), (0.5, "0.500"), (9.996, "10.00"), (1234.5, "1234")],
)
def test_figures_have_three_digits_and_no_exponent(value: float, text: str) -> None:
    assert three_digits(value) == text


@pytest.mark.parametrize(
    ("verdict", "asked", "told"),
    [
        ("missed", 2.0, "1.996x (95 % interval 1.982 to 2.018, 200 pairs), asked 2x"),
        ("inconclusive", 2.0, "1.996x (95 % interval 1.982 to 2.018, 200 pairs), asked 2x"),
        ("validated", 1.98, "2.00x (95 % interval 1.98 to 2.02, 200 pairs), asked 1.98x"),
        ("missed", 3.0, "2.00x (95 % interval 1.98 to 2.02, 200 pairs), asked 3x"),
    ],
)
def test_a_narrow_miss_does_not_read_like_what_was_asked(
    verdict: str, asked: float, told: str
) -> None:
    near = {"speedup": 1.996, "speedup_ci95": (1.982, 2.018)}
    latency = manifest().latency.model_copy(update=near)
    request = RequestRecord(model="minilm", speedup=asked)
    assert f"{verdict}  {told}\n" in printed(
        manifest(latency=latency, request=request, verdict=verdict)
    )


@pytest.mark.parametrize(("each_ms", "shown"), [(4.5, True), (5.0, False)])
def test_prices_of_sites_that_exceed_the_whole_network_are_not_shown(
    each_ms: float, shown: bool
) -> None:
    records = tuple(
        AllocationRecord(site=name, level=Level(4), units=12, predicted_ms=each_ms, error=0.1)
        for name in ("a", "b")
    )
    text = printed(manifest(allocation=records))
    assert ("ms, priced alone" in text, f"{each_ms:.2f} " in text) == (shown, shown)
    assert "0.1000" in text


class TestOtherVerbs:
    def test_plan_prints_levels_and_the_compile_to_run(self, run: Run, pipeline: Any) -> None:
        site = Site("layer.0.heads", "heads", 12, (), (), (), "s")
        plan = FakePlan(Allocation({site.name: Level(7)}, 9.5, 0.1), [site])
        pipeline.plan_model = answer(pipeline, lambda: plan)
        code, out, _ = run("plan", "minilm", "--speedup", "2x", "--data", "d")
        assert code == 0
        assert "predicted 2.11x" in out
        assert "7/12" in out
        assert "texts: calibration 100 / test 50" in out
        assert "next: zipc compile minilm --target cpu --speedup 2x --data d -o OUT" in out

    def test_plan_s_next_command_asks_for_the_same(self, run: Run, pipeline: Any) -> None:
        plan = FakePlan(Allocation({"a": Level(7)}, 9.5, 0.1), [])
        pipeline.plan_model = pipeline.compile_model = answer(pipeline, lambda: plan)
        flags = "--no-prune --numerics int8 --text-column a --text-column b --exclude 'x *'"
        flags += " --threads 2 --batch-size 4 --sequence-length 64 --effort quick --seed 3"
        flags += " --weights w.safetensors --input-shapes x:8x64 --quantizer modelopt"
        flags += " --metric pearson --label-column c --cache-dir k --allow-table-mismatch"
        _, out, _ = run("plan", "m", "--latency", "5ms", "--data", "my data", *shlex.split(flags))
        following = next(line for line in out.splitlines() if line.startswith("next: zipc "))
        pipeline.compile_model = answer(pipeline, manifest)
        run(*shlex.split(following.removeprefix("next: zipc ")))
        planned, compiled = pipeline.requests
        assert compiled == replace(planned, output=Path("OUT"))

    def test_profile_takes_no_speedup(self, run: Run, pipeline: Any) -> None:
        code, _, err = run("profile", "minilm", "--speedup", "2x")
        assert code == 2
        assert "--speedup" in err

    def test_profile_prints_where_the_table_is(self, run: Run, profiling: Any) -> None:
        code, out, _ = run("profile", "minilm")
        assert code == 0
        assert "130 measured prices, made in 42 s" in out
        assert "tables/cpu.json" in out

    def test_profile_makes_a_table_for_each_workload(self, run: Run, profiling: Any) -> None:
        sizes = ("--workloads", "1x128, 8x128,1x384,1x128")
        code, out, _ = run("profile", "minilm", *sizes, "--format", "json")
        asked = [(r.batch_size, r.sequence_length) for r in profiling.requests]
        assert (code, len(json.loads(out)["tables"])) == (0, 3)
        assert asked == [(1, 128), (8, 128), (1, 384)]
        checked = json.loads(run("profile", "m", *sizes, "--dry-run", "--format", "json")[1])
        requests = [document["request"] for document in checked["tables"]]
        assert [(r["batch_size"], r["sequence_length"]) for r in requests] == asked
        assert run("profile", "m", *sizes, "--dry-run")[1].count("batch_size") == 3

    def test_workloads_of_a_decode_step_and_of_images(self, run: Run, profiling: Any) -> None:
        assert run("profile", "m", "--phase", "decode", "--workloads", "2x64")[0] == 0
        assert run("profile", "m", "--workloads", "1,8")[0] == 0
        asked = [(r.batch_size, r.sequence_length, r.past_length) for r in profiling.requests]
        assert asked == [(2, None, 64), (1, None, None), (8, None, None)]

    @pytest.mark.parametrize("sizes", ["", "0x128", "1x", "1x128,", "axb", "1x2x3", "-1x5"])
    def test_workloads_that_are_no_sizes(self, run: Run, profiling: Any, sizes: str) -> None:
        code, _, err = run("profile", "minilm", f"--workloads={sizes}")
        assert (code, "1x128,8x128 for several" in err, profiling.requests) == (2, True, [])

    def test_sizes_are_given_once(self, run: Run, profiling: Any) -> None:
        code, _, err = run("profile", "minilm", "--workloads", "1x128", "--batch-size", "2")
        assert (code, "leave out --batch-size" in err) == (2, True)

    def test_inspect_prints_the_same_report(self, run: Run, tmp_path: Path) -> None:
        manifest().write(tmp_path)
        code, out, _ = run("inspect", str(tmp_path / "manifest.json"))
        assert code == 0
        assert "validated  2.04x" in out
        document = json.loads(
            run("inspect", str(tmp_path / "manifest.json"), "--format", "json")[1]
        )
        assert document["verdict"]

    def test_inspect_refuses_files_that_are_not_those_of_the_manifest(
        self, run: Run, tmp_path: Path
    ) -> None:
        manifest().write(tmp_path)
        for content in (None, b"another graph"):
            if content is not None:
                (tmp_path / "reference.onnx").write_bytes(content)
            code, out, err = run("inspect", str(tmp_path))
            assert (code, out) == (2, "")
            assert "reference.onnx missing or changed" in " ".join(err.split())

    def test_check_hands_over_rules_and_returns_the_gate_s_code(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from zipc import gate

        seen: dict[str, Any] = {}

        def check(new: Path, base: Path, **keywords: Any) -> FakeGate:
            seen.update(keywords, new=new, base=base)
            return FakeGate()

        monkeypatch.setattr(gate, "check", check)
        code, out, _ = run(
            *("check", "NEW", "--baseline", "BASE", "--fail-on", "p99:15%", "--max-time", "2m"),
            *("--min-delta", "0.1ms", "--threads", "2", "--format", "json"),
        )
        assert code == 3
        assert json.loads(out)["status"] == "inconclusive"
        seen.pop("progress")
        assert seen == {
            "new": Path("NEW"),
            "base": Path("BASE"),
            "fail_on": "p99:15%",
            "max_time_s": 120.0,
            "min_delta_ms": pytest.approx(0.1),
            "threads": 2,
            "batch_size": None,
            "sequence_length": None,
        }

    def test_check_keeps_what_the_baseline_was_compiled_for_beside_the_flags_given(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from zipc import gate

        seen: list[Workload] = []

        def open_runner(path: Path, *, workload: Workload) -> Any:
            seen.append(workload)
            raise NoisyMeasurement("seen enough")

        monkeypatch.setitem(gate.RUNNERS, "onnxruntime", open_runner)
        manifest(workload=Workload(8, 32, 1)).write(tmp_path)
        (tmp_path / "model.onnx").write_bytes(relu_graph.graph())
        run("check", str(tmp_path), "--baseline", str(tmp_path), "--threads", "2")
        assert seen == [Workload(8, 32, 2)]

    @pytest.mark.parametrize("delta", ["-1ms", "0", "soon"])
    def test_bad_delta_is_told_under_its_own_name(self, run: Run, delta: str) -> None:
        code, _, err = run("check", "NEW", "--baseline", "BASE", f"--min-delta={delta}")
        assert code == 2
        assert f"--min-delta '{delta}'" in err

    def test_bench_of_nothing_is_bad_usage(self, run: Run, tmp_path: Path) -> None:
        code, _, err = run("bench", str(tmp_path))
        assert code == 2
        assert "not a finished compile" in err

    def test_bench_time_becomes_pairs_of_four_runs(self) -> None:
        made = manifest()  # 20 + 9.8 ms, each run twice
        assert pairs_within(30.0, made) == int(30 / (2 * 0.0298))
        with pytest.raises(UsageError, match=r"Give at least 3\.6s"):
            pairs_within(1.0, made)
        unmeasured = made.latency.model_copy(update={"compiled_ms": None})
        with pytest.raises(UsageError, match="never measured"):
            pairs_within(30.0, manifest(latency=unmeasured))

    @pytest.mark.parametrize("ms", [0.003, 0.0417, 20.9, 42.5, 83.3, 5000.0])
    def test_bench_time_that_is_advised_is_enough(self, ms: float) -> None:
        latency = {"reference_ms": ms, "compiled_ms": ms / 2}
        made = manifest(latency=manifest().latency.model_copy(update=latency))
        with pytest.raises(UsageError) as caught:
            pairs_within(1e-6, made)
        (advised,) = re.findall(r"at least (\S+)\.$", str(caught.value))
        assert 60 <= pairs_within(parse_seconds(advised, "--max-time"), made) < 68

    def test_doctor_finds_this_environment_in_order(self, run: Run) -> None:
        code, out, _ = run("doctor", "--format", "json")
        document = json.loads(out)
        assert (code, document["ok"]) == (0, True)
        assert {"python", "torch", "onnxruntime"} <= {f["name"] for f in document["findings"]}

    def test_doctor_names_the_variable_of_a_cache_that_cannot_be_written(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("ZIPC_CACHE_DIR", str(tmp_path / "file"))
        code, out, _ = run("doctor", "--format", "json")
        (cache,) = [f for f in json.loads(out)["findings"] if f["name"] == "cache"]
        assert (code, cache["status"]) == (2, "broken")
        assert "ZIPC_CACHE_DIR" in cache["fix"]

    def test_version_and_help(self, run: Run) -> None:
        assert run("--version") == (0, "zipc 0.1.0\n", "")
        code, out, _ = run("--help")
        assert code == 0
        verbs = "compile plan profile bench inspect check doctor targets tables".split()
        assert all(verb in out for verb in verbs)

    def test_python_m_zipc_is_the_same_program(self) -> None:
        command = [sys.executable, "-m", "zipc", "--version"]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (ran.returncode, ran.stdout) == (0, "zipc 0.1.0\n")


def test_plain_progress_tells_each_stage_and_its_time() -> None:
    lines: list[str] = []
    now = [0.0]
    progress = Lines(lines.append, clock=lambda: now[0])
    progress.stage("profile", total=30)
    for _ in range(30):
        now[0] += 1.0
        progress.advance(note="ffn")
    progress.stage("search")
    now[0] += 2.5
    progress.done("3 sites")
    progress.done()
    assert lines == [
        "profile ...",
        "profile: 10/30 · ffn",
        "profile: 20/30 · ffn",
        "profile: 30/30 · ffn",
        "profile: 30.0 s",
        "search ...",
        "search: 2.5 s · 3 sites",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_draws_every_stage_once_it_is_done(terminal: bool) -> None:
    stream = io.StringIO()
    with open_progress(Console(file=stream, force_terminal=terminal, width=90)) as progress:
        progress.stage("evidence", total=2)
        progress.advance(note="batch [1]")
        progress.info("columns: [a]")
        progress.stage("search")
    controls = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]")
    lines = [line for line in controls.sub("", stream.getvalue()).splitlines() if line.strip()]
    assert any("evidence" in line for line in lines)
    assert any("columns: [a]" in line for line in lines)
    assert "search" in lines[-1]


@dataclass
class FakePlan:
    allocation: Allocation
    sites: list[Site]
    dense_ms: float = 20.0
    predicted_speedup: float = 20.0 / 9.5
    left_alone: tuple[Any, ...] = ()
    data: str = "texts: calibration 100 / test 50"

    def to_json(self) -> dict[str, Any]:
        return {"predicted_ms": self.allocation.predicted_ms}


@dataclass
class FakeProfile:
    table_path: Path = Path("tables/cpu.json")
    kind: str = "measured"
    entries: int = 130
    seconds: float = 42.0
    from_cache: bool = False
    workload: str = "batch 1"

    def to_json(self) -> dict[str, Any]:
        return {"entries": self.entries}


@dataclass
class FakeGate:
    status: str = "inconclusive"
    exit_code: int = 3

    def to_json(self) -> dict[str, Any]:
        return {"status": self.status}
