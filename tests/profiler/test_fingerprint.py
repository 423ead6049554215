from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from zipc.core.errors import UsageError
from zipc.profiler import facts as module
from zipc.profiler.fingerprint import device_fingerprint, device_state

CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Platinum 8481C
cpu MHz\t\t: {mhz}
flags\t\t: fpu sse avx2 avx512_vnni amx_int8 rdrand

processor\t: 1
model name\t: another
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake /proc and /sys."""
    (tmp_path / "cpuinfo").write_text(CPUINFO.format(mhz=2000.5))
    cache = tmp_path / "cpu/cpu0/cache/index0"
    cache.mkdir(parents=True)
    for name, value in {"level": "2", "size": "2048K", "type": "Unified"}.items():
        (cache / name).write_text(value + "\n")
    zone = tmp_path / "thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "type").write_text("x86_pkg_temp\n")
    (zone / "temp").write_text("54000\n")
    monkeypatch.setattr(module, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(module, "CPU_FOLDER", tmp_path / "cpu")
    monkeypatch.setattr(module, "THERMAL_FOLDER", tmp_path / "thermal")
    return tmp_path


def test_fingerprint_names_what_prices_depend_on(machine: Path) -> None:
    stable = device_fingerprint(runtime="onnxruntime")
    assert stable["cpu"] == "Intel(R) Xeon(R) Platinum 8481C"
    assert stable["cpu_id"] == "GenuineIntel/6/143"
    assert stable["isa"] == ["amx_int8", "avx2", "avx512_vnni"]
    assert stable["caches"] == ["L2 2048K"]
    assert stable["runtime_version"] == version("onnxruntime")
    assert "governor" not in stable


def test_fingerprint_ignores_clocks_and_temperature(machine: Path) -> None:
    before, state = device_fingerprint(runtime="onnxruntime"), device_state()
    (machine / "cpuinfo").write_text(CPUINFO.format(mhz=3500.0))
    (machine / "thermal/thermal_zone0/temp").write_text("90000")
    assert device_fingerprint(runtime="onnxruntime") == before
    assert (state["cpu_mhz"], device_state()["cpu_mhz"]) == (2000.5, 3500.0)
    assert state["temperature_c"] == {"thermal_zone0:x86_pkg_temp": 54.0}


def test_fingerprint_sees_a_missing_isa_feature_and_a_governor(machine: Path) -> None:
    before = device_fingerprint(runtime="onnxruntime")
    (machine / "cpuinfo").write_text(CPUINFO.format(mhz=1).replace("amx_int8", ""))
    folder = machine / "cpu/cpu0/cpufreq"
    folder.mkdir()
    (folder / "scaling_governor").write_text("powersave\n")
    after = device_fingerprint(runtime="onnxruntime")
    assert {name for name in after if after.get(name) != before.get(name)} == {"isa", "governor"}


def test_this_machine_gives_the_same_fingerprint_twice_as_plain_json() -> None:
    stable = device_fingerprint(runtime="onnxruntime")
    assert json.loads(json.dumps(stable)) == stable == device_fingerprint(runtime="onnxruntime")
    assert json.loads(json.dumps(device_state())).keys() <= {
        "cpu_mhz",
        "load_average",
        "temperature_c",
    }


def test_a_runtime_that_is_unknown_or_absent_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UsageError, match="Choose one of"):
        device_fingerprint(runtime="onnx-runtime")
    monkeypatch.setitem(module.DISTRIBUTIONS, "openvino", ("no-such-distribution",))
    with pytest.raises(UsageError, match="pip install openvino"):
        device_fingerprint(runtime="openvino")


def test_fingerprint_and_sweep_import_no_framework() -> None:
    code = (
        "import sys, zipc.profiler.fingerprint, zipc.profiler.sweep, zipc.latency_tables.store;"
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
