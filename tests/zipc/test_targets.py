"""Targets: files that say what a device can do, and the verbs around them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.command_line import Run
from zipc.core.errors import UsageError
from zipc.core.request import Request
from zipc.numerics.bf16 import BF16
from zipc.numerics.int4 import INT4
from zipc.numerics.int8 import DYNAMIC, STATIC
from zipc.targets import SUPPORTED, load_target, requested_target, shipped_files, target_files

OWN = 'runtime = "onnxruntime"\n'
DESK = f'{OWN}numerics = ["fp32"]\nwidth_step = 8\ndescription = "on my desk"\n'
A100 = shipped_files()["a100"].read_text()


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZIPC_CONFIG_DIR", str(tmp_path / "config"))
    return tmp_path / "config"


def test_supported_numerics_are_the_implemented_ones() -> None:
    assert SUPPORTED["numerics"] == ("fp32", "fp16", BF16, DYNAMIC, STATIC, INT4)


def test_cpu_is_built_in() -> None:
    target = load_target("cpu")
    assert (target.name, target.runtime) == ("cpu", "onnxruntime")
    assert target_files()["cpu"] == shipped_files()["cpu"]


ROOT = Path(__file__).parents[2]
GPUS = ("a100", "h100", "h200", "l4", "orin", "orin-nano", "orin-nx", "rtx4090", "t4")


@pytest.mark.parametrize("name", GPUS)
def test_gpus_come_with_their_sheet_and_its_source(name: str) -> None:
    target = load_target(name)
    assert target.sheet is not None
    assert target.sheet.source
    assert (target.runtime, target.reference_numeric) == ("tensorrt", "fp16")
    assert target.sheet.sparse == (target.sheet.compute_capability >= "8.0")


def test_a_power_mode_changes_the_sheet_alone() -> None:
    full, thirty = load_target("orin"), load_target("orin:30w")
    assert full.sheet is not None
    assert thirty.sheet is not None
    assert (thirty.name, thirty.mode) == ("orin:30w", "30w")
    assert thirty.sheet.int8_tops < full.sheet.int8_tops / 2
    assert thirty.sheet.source == full.sheet.source
    assert replace(thirty, name="orin", mode="", sheet=full.sheet) == full


@pytest.mark.parametrize(
    ("name", "said"),
    [("orin:90w", r"no power mode '90w'.*orin:50w, orin:30w"), ("cpu:30w", "no power mode '30w'")],
)
def test_an_unknown_power_mode_is_answered_with_those_there_are(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_target(name)


@pytest.mark.parametrize("key", ["multiprocessors", "fp16_tflops", "bandwidth_gbs"])
def test_figures_of_a_sheet_are_positive(tmp_path: Path, key: str) -> None:
    text = shipped_files()["a100"].read_text()
    file = tmp_path / "mine.toml"
    file.write_text(re.sub(rf"{key} = \d+", f"{key} = 0", text))
    with pytest.raises(UsageError, match=f"{key} must be positive"):
        load_target(str(file))


def test_doctor_tells_what_works_for_a_target(run: Run) -> None:
    code, out, _ = run("doctor", "--target", "orin", "--format", "json")
    found = {f["name"]: f for f in json.loads(out)["findings"]}
    assert code == 0
    assert "predicted" in found["compile, plan"]["detail"]
    assert "published latencies of this device: of other networks" in found["model"]["detail"]
    assert found["trtexec"]["status"] == "ok" or "compute capability 8.7" in found["trtexec"]["fix"]
    assert "RTX does not build for sm87" in found["engine"]["detail"]  # nobody tests on an Orin
    code, out, _ = run("doctor", "--target", "cuda")
    assert (code, "no NVIDIA GPU here" in " ".join(out.split())) in ((0, False), (2, True))
    code, _, err = run("doctor", "--target", "orim")
    assert (code, "Did you mean 'orin'" in err) == (2, True)


def test_unknown_target_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"Unknown target 'cpuu'\. Did you mean 'cpu'\?"):
        load_target("cpuu")


def test_own_target_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "desk.toml"
    file.write_text('runtime = "onnxruntime"\nnumerics = ["fp32"]\nwidth_step = 8\n')
    expected = replace(load_target("cpu"), name="desk", numerics=("fp32",), width_step=8)
    assert load_target(str(file)) == replace(expected, description="")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('runtime = "x', "not valid TOML"),
        ('runtime = "x"', "numerics"),
        ('runtime = "x"\nnumerics = ["fp32"]\nwidth = 3', "unknown keys: width"),
        ('runtime = "x"\nnumerics = ["fp32"]\nwidth_step = 0', "width_step"),
        ('runtime = "x"\nnumerics = ["int8-static"]', "reference numeric"),
        ('runtime = "tensorrt"\nnumerics = ["fp32"]', "sheet"),
        ('runtime = "tvm"\nnumerics = ["fp32"]', "runtime 'tvm'.*onnxruntime, openvino"),
        (
            A100.replace('"fp16", ', '"fp16", "int4-weights", '),
            "int4-weights is not offered under tensorrt",
        ),
        (f'{OWN}numerics = ["fp32", "int3"]', "numerics 'int3'.*int8-static"),
        (f'{OWN}numerics = ["fp32"]\nconnection = "ssh"', "connection 'ssh'.*local"),
        (
            f'{OWN}numerics = ["int8-static"]\nreference_numeric = "int8-static"',
            "reference_numeric 'int8-static'.*fp32",
        ),
    ],
)
def test_bad_target_file_says_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "desk.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=said):
        load_target(str(file))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "--phase decode, or choose auto, int8, fp32, int8-dynamic, int8-static"),
        ({"phase": "decode", "runtime": "openvino"}, "on target 'cpu' under openvino. Choose auto"),
        ({"phase": "decode", "runtime": "auto"}, "under openvino"),
        ({"phase": "decode", "target": "a100"}, "'a100' under tensorrt.*int8, fp16, int8-static"),
    ],
)
def test_int4_weights_are_for_decode_steps_under_onnx_runtime(
    asked: dict[str, str], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        requested_target(Request(model="m", numerics=INT4, **asked))  # type: ignore[arg-type]
    decode = Request(model="m", numerics=INT4, phase="decode")
    assert INT4 in requested_target(decode).numerics
    assert INT4 not in requested_target(Request(model="m")).numerics


@pytest.mark.parametrize(
    ("target", "numerics", "choice"),
    [
        ("cpu", "fp16", "int8, fp32, int8-dynamic"),
        ("a100", "fp32", "int8, fp16, int8-static"),
        ("both.toml", "fp16", "int8, fp32, int8-static."),
    ],
)
@pytest.mark.parametrize("verb", ["profile", "plan", "compile"])
def test_floats_that_the_target_does_not_run_in_are_refused_at_once(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    target: str,
    numerics: str,
    choice: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("both.toml").write_text(f'{OWN}numerics = ["fp32", "fp16", "int8-static"]\n')
    goal = [] if verb == "profile" else ["--speedup", "2x", "--data", str(ROOT / "examples/stsb")]
    out = ["-o", "out"] if verb == "compile" else []
    flags = ["--target", target, "--numerics", numerics, *goal, *out]
    for dry in ([], ["--dry-run"]):
        code, _, err = run(verb, "a/model", *flags, *dry)
        said = " ".join(err.split())
        assert (code, f"--numerics {numerics} is not offered" in said, choice in said) == (
            2,
            True,
            True,
        )


def test_missing_target_file_names_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"cannot be read.*name of a target: .*cpu"):
        load_target("./nowhere.toml")


def test_an_added_target_is_found_by_its_name(run: Run, tmp_path: Path, config: Path) -> None:
    file = tmp_path / "desk.toml"
    file.write_text(DESK)
    code, out, _ = run("targets", "add", str(file), "--format", "json")
    assert code == 0
    assert json.loads(out) == {"name": "desk", "file": str(config / "targets" / "desk.toml")}
    assert load_target("desk") == load_target(str(file))
    file.unlink()
    code, out, _ = run("targets", "list", "--format", "json")
    found = {row["name"]: row for row in json.loads(out)["targets"]}
    assert (found["cpu"]["shipped"], found["desk"]["shipped"]) == (True, False)
    assert found["desk"]["width_step"] == 8
    code, out, _ = run("targets", "list")
    assert "on my desk" in out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cpu", "target 'cpu' already"),
        ("../x", "cannot be the name"),
        ("", "cannot be the name"),
        (None, "target 'desk' already"),
    ],
)
def test_a_target_is_not_added_over_another(
    run: Run, tmp_path: Path, config: Path, name: str | None, said: str
) -> None:
    file = tmp_path / "desk.toml"
    file.write_text(DESK)
    run("targets", "add", str(file))
    flags = [] if name is None else ["--name", name]
    code, _, err = run("targets", "add", str(file), *flags)
    assert code == 2
    assert said in err
    assert [p.name for p in (config / "targets").iterdir()] == ["desk.toml"]


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        (f'name = "cpu"\n{DESK}', None, "calls itself 'cpu'"),
        (f'name = "../x"\n{DESK}', None, "calls itself '../x'"),
        (DESK, "desk.toml", "no .toml"),
        (A100.replace('anchors = "a100"', 'anchors = "mine"'), None, "No model of devices 'mine'"),
        (f"{A100}\n[modes.slow]\nmultiprocessors = 0\n", None, "multiprocessors must be"),
        (f"{A100}\n[modes.slow]\nfoo = 3\n", None, "unknown keys in [modes.slow]: foo"),
        (f"{A100}\n[modes]\nslow = 3\n", None, "modes.slow must be a table"),
        (f"{A100}\nfoo = 3\n", None, "unknown keys in [sheet]: foo"),
        (f"modes = 3\n{A100}", None, "modes must be a table"),
        (A100.replace('"8.0"', '"banana"'), None, "compute_capability 'banana' is not"),
        (A100.replace("sparse = true", 'sparse = "yes"'), None, "sheet.sparse: Input should be"),
        (A100.replace("= 1555", '= "1555"'), None, "sheet.bandwidth_gbs: Input should be"),
        (A100.replace("= 1555", "= 1e300"), None, "bandwidth_gbs must be positive"),
        (A100.replace("= 1555", "= 1e-300"), None, "bandwidth_gbs must be positive"),
        (A100.replace("= 1555", "= inf"), None, "bandwidth_gbs"),
        (A100.replace("{ fp16 = 8", "{ fp17 = 8"), None, "width_grid has 'fp17'"),
        (A100.replace("{ fp16 = 8", "{ fp16 = 0"), None, "steps of width_grid must be"),
        (A100.replace('["dense", ', '["dense", "dense", '), None, "patterns has dense twice"),
        (f'{OWN}numerics = ["fp32", "fp32"]', None, "numerics has fp32 twice"),
        (f'{OWN}numerics = ["fp32"]\nwidth_step = 1000000000', None, "width_step must be"),
        (f'{OWN}numerics = ["fp32"]\nwidth_step = "8"', None, "width_step: Input should be"),
        (f'{OWN}numerics = ["fp32"]\nconnection = "remote"', None, "is for the runtime tensorrt"),
        (f'{OWN}numerics = ["fp32"]\ndescription = "\\u001b[2J"', None, "control characters"),
    ],
)
def test_a_target_that_could_not_be_used_is_not_added(
    run: Run, tmp_path: Path, config: Path, text: str, name: str | None, said: str
) -> None:
    file = tmp_path / "desk.toml"
    file.write_text(text)
    flags = [] if name is None else ["--name", name]
    code, _, err = run("targets", "add", str(file), *flags)
    assert (code, said in " ".join(err.split())) == (2, True)
    assert not config.exists()


def test_a_target_that_cannot_be_kept_names_the_variable_of_the_folder(
    run: Run, tmp_path: Path, config: Path
) -> None:
    config.write_text("")
    (tmp_path / "desk.toml").write_text(DESK)
    code, _, err = run("targets", "add", str(tmp_path / "desk.toml"))
    assert (code, "ZIPC_CONFIG_DIR" in err) == (2, True)


def test_a_copy_of_a_shipped_target_is_one_of_its_own(
    run: Run, tmp_path: Path, config: Path
) -> None:
    file = tmp_path / "desk.toml"
    file.write_text(shipped_files()["cpu"].read_text())
    assert run("targets", "add", str(file))[0] == 0
    assert load_target("desk") == replace(load_target("cpu"), name="desk")


def test_a_damaged_target_is_listed_as_such_and_not_added(
    run: Run, tmp_path: Path, config: Path
) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("runtime = ")
    code, _, err = run("targets", "add", str(bad))
    assert (code, "not valid TOML" in err) == (2, True)
    assert not config.exists()
    (config / "targets").mkdir(parents=True)
    bad.rename(config / "targets" / "bad.toml")
    code, out, _ = run("targets", "list")
    assert code == 0
    assert "not read: " in out
    assert "bad.toml is not valid TOML" in out


def test_show_prints_every_field(run: Run) -> None:
    code, out, _ = run("targets", "show", "cpu", "--format", "json")
    assert code == 0
    assert json.loads(out)["runtime"] == load_target("cpu").runtime
    code, _, err = run("targets", "show", "cpuu")
    assert (code, "Did you mean 'cpu'" in err) == (2, True)
