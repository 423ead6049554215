"""A model from a function in the user's file: made, filled, fed and named, or refused in words."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from zipc.core.errors import UnsupportedModel, UsageError
from zipc.core.files import sha256_file
from zipc.core.request import Request
from zipc.core.shapes import parse_input_shapes
from zipc.core.types import InputSpec
from zipc.model_source import load_source, trace_source
from zipc.samples import inputs_of_rows

NETS = """
    from __future__ import annotations
    from dataclasses import dataclass
    import torch
    from torch import nn
    from sizes import WIDTH

    class Net(nn.Module):
        def __init__(self, width: int = WIDTH):
            super().__init__()
            self.conv = nn.Conv2d(3, width, 3, padding=1)
            self.norm = nn.BatchNorm2d(width)
            self.head = nn.Linear(width, 5)

        def forward(self, x):
            return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))

    def net(): return Net()
    def half(): return Net().half()
    def bad(): return Net(width=-1)
    def number(): return 7
    def needs(size): return Net(size)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(11, 4)
            self.head = nn.Linear(4, 11, bias=False)
            self.head.weight = self.table.weight
        def forward(self, ids):
            return self.head(self.table(ids))

    def tied(): return Tied()

    @dataclass
    class Found:
        boxes: torch.Tensor
        extra: object = None
        scores: torch.Tensor | None = None

    class Shaped(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.kind, self.linear = kind, nn.Linear(4, 6)
        def forward(self, x, scale=None):
            y = self.linear(x)
            y = y if scale is None else y * scale
            return {
                "tensor": y, "tuple": (y, 3, y + 1), "list": [y], "dict": {"b": y, "a": (y, -y)},
                "dataclass": Found(y, None, y + 1), "same": {"x": y}, "nothing": None,
            }[self.kind]

    def tensor(): return Shaped("tensor")
    def pair(): return Shaped("tuple")
    def alone(): return Shaped("list")
    def keys(): return Shaped("dict")
    def data(): return Shaped("dataclass")
    def same(): return Shaped("same")
    def nothing(): return Shaped("nothing")

    class OneImage(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(12, 3)
        def forward(self, x):
            return self.linear(x.reshape(1, 12))

    def one(): return OneImage()

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
        def forward(self, x):
            for row in range(int(x.shape[0])):
                x = x + self.linear(x)
            return x

    def loop(): return Fixed()

    class Broken(nn.Module):
        def forward(self, x):
            return self.inner(x)
        def inner(self, x):
            raise ValueError("no such luck")

    def broken(): return Broken()
    def meta():
        with torch.device("meta"):
            return Net()
    def sparse():
        module = nn.Linear(4, 4)
        module.weight = nn.Parameter(torch.eye(4).to_sparse(), requires_grad=False)
        return module
    def infinite():
        module = nn.Linear(4, 4)
        module.bias.data[1] = float("inf")
        return module
    LAYERS = 3
"""
IMAGE = parse_input_shapes("x:1x3x8x8")
ROW = parse_input_shapes("x:1x4")


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    (tmp_path / "sizes.py").write_text("WIDTH = 6\n")
    path = tmp_path / "nets.py"
    path.write_text(textwrap.dedent(NETS))
    return path


def weights_of(source: str, path: Path, **changed: torch.Tensor) -> Path:
    """Safetensors of a factory's model, all values drawn anew."""
    module = load_source(source, input_shapes=IMAGE).module
    generator = torch.Generator().manual_seed(5)
    state = {
        n: torch.rand(t.shape, generator=generator).to(t.dtype)
        for n, t in module.state_dict().items()
    }
    save_file(state | changed, path)
    return path


def test_weights_are_loaded_and_the_function_is_the_modules_own(nets: Path, tmp_path: Path) -> None:
    path = weights_of(f"{nets}:net", tmp_path / "w.safetensors")
    source = load_source(f"{nets}:net", weights=path, input_shapes=IMAGE)
    assert source.sha256 == sha256_file(path)
    assert (source.folder, source.config, source.tokenizer) == (None, None, None)
    assert source.inputs == ["x"]
    assert source.outputs == [(0, "output")]
    assert source.task == "image_classes"
    assert not source.module.training
    assert not source.notes
    conv: Any = source.module.conv
    assert torch.equal(conv.bias, torch.randn(6, 3, 3, 3).new_tensor(_bias(path)))
    program = trace_source(source)
    example = source.example(batch=4)
    assert example["x"].shape == (4, 3, 8, 8)
    expected = source.module(**example)
    torch.testing.assert_close(program.exported.module()(**example), expected)


def _bias(path: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(path)["conv.bias"].tolist()


def test_factory_draws_the_same_weights_each_time_and_leaves_the_seed_alone(nets: Path) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, second = (load_source(f"{nets}:net", input_shapes=IMAGE) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.sha256 == second.sha256
    assert any("no --weights" in note for note in first.notes)


def test_import_leaves_the_search_path_alone(nets: Path) -> None:
    before = list(sys.path)
    load_source(f"{nets}:net", input_shapes=IMAGE)
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("tensor", ["output"]),
        ("pair", ["output_0", "output_2"]),
        ("alone", ["output_0"]),
        ("keys", ["b", "a_0", "a_1"]),
        ("data", ["boxes", "scores"]),
        ("same", ["x_output"]),
    ],
)
def test_outputs_are_named_and_traced_in_their_order(
    nets: Path, name: str, names: list[str]
) -> None:
    source = load_source(f"{nets}:{name}", input_shapes=ROW)
    assert [public for _, public in source.outputs] == names
    assert source.task == "tensors"
    program = trace_source(source)
    assert len(program.outputs) == len(names)
    with torch.no_grad():
        expected = source.chosen(source.module(**source.example()))
        found = source.chosen(program.exported.module()(**source.example()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_inputs_of_forward_with_a_default_may_be_given_too(nets: Path) -> None:
    shapes = parse_input_shapes("scale:2x6,x:2x4")
    source = load_source(f"{nets}:tensor", input_shapes=shapes)
    assert source.inputs == ["x", "scale"]
    assert source.dynamic == {"x": {0: "batch"}, "scale": {0: "batch"}}


def test_unequal_first_sizes_are_no_batch(nets: Path) -> None:
    shapes = parse_input_shapes("x:2x4,scale:1x6")
    source = load_source(f"{nets}:tensor", input_shapes=shapes)
    assert source.axes == set()
    assert source.example(batch=7)["x"].shape == (2, 4)


@pytest.mark.parametrize(
    ("value", "shape", "dtype"),
    [
        ("torch.zeros(2, 3, 8, 8)", ("batch", 3, 8, 8), "float32"),
        ("(torch.zeros(2, 3, 8, 8, dtype=torch.float16),)", ("batch", 3, 8, 8), "float32"),
        ("{'x': torch.zeros(1, 3, 4, 4)}", ("batch", 3, 4, 4), "float32"),
    ],
)
@pytest.mark.parametrize("function", [True, False])
def test_example_inputs_of_the_file_say_the_sizes(
    nets: Path, value: str, shape: tuple[Any, ...], dtype: str, function: bool
) -> None:
    line = f"example_inputs = {'lambda: ' if function else ''}{value}\n"
    nets.write_text(nets.read_text() + line)
    (spec,) = load_source(f"{nets}:net").specs
    assert (spec.name, spec.shape, spec.dtype) == ("x", shape, dtype)
    (spec,) = load_source(f"{nets}:net", input_shapes=IMAGE).specs
    assert spec.shape == ("batch", 3, 8, 8)


def test_integers_of_example_inputs_stay_below_the_largest(nets: Path) -> None:
    nets.write_text(nets.read_text() + "example_inputs = (torch.tensor([[3, 10, 2, 1]]),)\n")
    source = load_source(f"{nets}:tied")
    assert source.specs[0].dtype == "int64"
    ids = source.example(batch=64)["ids"]
    assert ids.shape == (64, 4)
    assert int(ids.max()) == 10
    shaped = load_source(f"{nets}:tied", input_shapes=parse_input_shapes("ids:1x9"))
    assert (shaped.specs[0].dtype, shaped.specs[0].shape) == ("int64", ("batch", 9))


def test_rows_of_the_data_say_the_sizes_where_nothing_else_does(nets: Path, tmp_path: Path) -> None:
    images, other = tmp_path / "images.npz", tmp_path / "ids.npz"
    np.savez(images, pixels=np.zeros((5, 8, 6, 3), np.uint8), labels=np.zeros(5))
    np.savez(other, ids=np.array([[4, 1, 0], [2, 2, 9]]))
    (spec,) = load_source(f"{nets}:net", rows=lambda: rows_of(images)).specs
    assert (spec.name, spec.shape, spec.dtype) == ("x", ("batch", 3, 8, 6), "float32")
    (spec,) = load_source(f"{nets}:net", rows=lambda: rows_of(images), input_shapes=IMAGE).specs
    assert spec.shape == ("batch", 3, 8, 8)
    (spec,) = load_source(f"{nets}:tied", rows=lambda: rows_of(other)).specs
    assert (spec.name, spec.shape, spec.dtype, spec.high) == ("ids", ("batch", 3), "int64", 10)


def rows_of(path: Path) -> list[InputSpec]:
    return inputs_of_rows(Request(model="", data=str(path)))


def test_weights_saved_without_the_tied_copy_fit(nets: Path, tmp_path: Path) -> None:
    shapes = parse_input_shapes("ids:1x4:int64")
    module: Any = load_source(f"{nets}:tied", input_shapes=shapes).module
    path = tmp_path / "tied.safetensors"
    save_model(module, str(path))
    source = load_source(f"{nets}:tied", weights=path, input_shapes=shapes)
    loaded: Any = source.module
    assert loaded.head.weight is loaded.table.weight
    assert torch.equal(loaded.head.weight, module.head.weight)


def test_model_on_the_meta_device_takes_its_values_from_the_weights(
    nets: Path, tmp_path: Path
) -> None:
    path = weights_of(f"{nets}:net", tmp_path / "w.safetensors")
    source = load_source(f"{nets}:meta", weights=path, input_shapes=IMAGE)
    assert source.module(**source.example()).shape == (2, 5)
    with pytest.raises(UsageError, match=r"has no values \(it is on the meta device\).*--weights"):
        load_source(f"{nets}:meta", input_shapes=IMAGE)


def test_half_precision_module_runs_in_fp32_and_is_said(nets: Path) -> None:
    source = load_source(f"{nets}:half", input_shapes=IMAGE)
    assert {p.dtype for p in source.module.parameters()} == {torch.float32}
    assert any("float16; it runs in float32" in note for note in source.notes)


def test_model_that_takes_one_batch_only_has_that_axis_fixed(nets: Path) -> None:
    source = load_source(f"{nets}:one", input_shapes=parse_input_shapes("x:1x3x2x2"))
    assert source.specs[0].shape == (1, 3, 2, 2)
    assert any("batches of 1 only" in note for note in source.notes)
    trace_source(source)


def test_model_that_traces_one_batch_only_has_that_axis_fixed(nets: Path) -> None:
    source = load_source(f"{nets}:loop", input_shapes=ROW)
    assert source.specs[0].shape == ("batch", 4)
    trace_source(source, batch=3)
    assert source.specs[0].shape == (3, 4)
    assert any("batches of 3 only" in note for note in source.notes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "bad",
            r"nets\.py:bad, called without arguments, raised RuntimeError: .*\n"
            r"  nets\.py, line 20, in bad: .*\n  nets\.py, line 11, in __init__: self\.conv = ",
        ),
        ("needs", r"nets\.py:needs, called without arguments, raised TypeError: .*'size'"),
        (
            "number",
            r"nets\.py:number must return .* it returned an object of type int",
        ),
        ("nett", r"nets\.py has no function 'nett'\. Did you mean 'net'\?"),
        ("LAYERS", r"LAYERS in nets\.py is of type int, not a function"),
        ("", r"Which function of .*nets\.py makes the model\? Give it as .*nets\.py:function\."),
        (
            "broken",
            r"nets\.py:broken: Broken fails on x:batchx.*no such luck\n.*in forward.*\n.*in inner",
        ),
        ("nothing", r"Shaped gives no tensor"),
        ("sparse", r"weight of Linear is stored as torch\.sparse_coo"),
        ("infinite", r"parameter bias contains NaN or infinity"),
    ],
)
def test_factory_without_a_usable_model_is_refused_in_words(
    nets: Path, name: str, message: str
) -> None:
    shapes = IMAGE if name in ("bad", "needs", "number", "nett") else ROW
    if name in ("sparse", "infinite"):
        shapes = parse_input_shapes("input:1x4")
    with pytest.raises(UsageError, match=message):
        load_source(f"{nets}:{name}", input_shapes=shapes)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ("", r"Net needs x, and nothing says how large\. Give --input-shapes 'x:1x3x224x224', "),
        ("y:1x3x8x8,z:1x2", r"needs x, and nothing"),
        ("x:1x3x8x8,y:1x2", r"Net\.forward takes x, not y"),
        ("x:1x4x8x8", r"fails on x:batchx4x8x8 \(from --input-shapes\): RuntimeError"),
        ("x:1x3x8x8:int64", r"fails on x:batchx3x8x8:int64 \(from --input-shapes\): RuntimeError"),
    ],
)
def test_inputs_that_are_not_those_of_the_model_are_refused(
    nets: Path, shapes: str, message: str
) -> None:
    given = parse_input_shapes(shapes) if shapes else ()
    with pytest.raises(UsageError, match=message):
        load_source(f"{nets}:net", input_shapes=given)


def test_the_only_input_may_be_given_under_any_name(nets: Path) -> None:
    source = load_source(f"{nets}:net", input_shapes=parse_input_shapes("y:1x3x8x8"))
    assert [str(spec) for spec in source.specs] == ["x:batchx3x8x8"]
    assert "'y' of --input-shapes is taken for x" in source.notes


def test_hint_for_a_missing_input_keeps_those_that_were_given(tmp_path: Path) -> None:
    path = tmp_path / "two.py"
    path.write_text(
        "from torch import nn\n"
        "class Two(nn.Module):\n"
        "    def forward(self, image, table, extra=None): return image\n"
        "def two(): return Two()\n"
    )
    for given, hint in (
        ("image:1x3x8x8", "image:1x3x8x8,table:1xN"),
        ("table:1x4:int64", "table:1x4:int64,image:1xN"),
    ):
        with pytest.raises(UsageError, match=f"Give --input-shapes '{hint}'"):
            load_source(f"{path}:two", input_shapes=parse_input_shapes(given))


def test_functions_that_can_make_a_model_are_listed_before_anything_else(tmp_path: Path) -> None:
    path = tmp_path / "many.py"
    path.write_text("from torch.nn import Linear\nclass Net(Linear): pass\ndef of(size): pass\n")
    with pytest.raises(UsageError, match=r"no function 'nosuch'\. It has: Net, of\.$"):
        load_source(f"{path}:nosuch")
    path.write_text(path.read_text() + "".join(f"def f{i}(): pass\n" for i in range(7)))
    with pytest.raises(UsageError, match=r"It has: f0, f1, f2, f3, f4 and 2 more\.$"):
        load_source(f"{path}:nosuch")


def test_weights_that_do_not_fit_are_named(nets: Path, tmp_path: Path) -> None:
    source, path = f"{nets}:net", tmp_path / "w.safetensors"
    weights_of(source, path, **{"head.weight": torch.zeros(5, 7), "tail.bias": torch.zeros(2)})
    with pytest.raises(
        UsageError,
        match=r"w\.safetensors does not fit .*nets\.py:net: head\.weight is \[5, 7\] in the file "
        r"and \[5, 6\] in the model; the model has no tail\.bias",
    ):
        load_source(source, weights=path, input_shapes=IMAGE)
    save_file({"conv.weight": torch.zeros(6, 3, 3, 3)}, path)
    with pytest.raises(
        UsageError, match=r"the file lacks conv\.bias, norm\.weight, norm\.bias and 4 more"
    ):
        load_source(source, weights=path, input_shapes=IMAGE)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UsageError, match=r"cannot be loaded.*truncated"):
        load_source(source, weights=path, input_shapes=IMAGE)
    with pytest.raises(UsageError, match="there is no such file"):
        load_source(source, weights=tmp_path / "none.safetensors", input_shapes=IMAGE)
    pickled = tmp_path / "w.pt"
    torch.save({}, pickled)
    with pytest.raises(UsageError, match="never pickles"):
        load_source(source, weights=pickled, input_shapes=IMAGE)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "import nothing_of_this_name",
            r"importing it raised ModuleNotFoundError.*\n.*line 1, in <m",
        ),
        ("example_inputs = 3\n", "must give a tensor, a tuple of tensors, or a dict"),
        ("def example_inputs():\n    raise ValueError('no data')", r"example_inputs raised ValueE"),
    ],
)
def test_user_file_that_fails_is_told_with_its_line(nets: Path, line: str, message: str) -> None:
    first = line.startswith("import")
    text = nets.read_text()
    nets.write_text(line if first else f"{text}\n{line}\n")
    with pytest.raises(UsageError, match=message):
        load_source(f"{nets}:net")


def test_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no file .*none\.py"):
        load_source(f"{tmp_path}/none.py:net")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_module_that_torch_quantised_is_refused(tmp_path: Path) -> None:
    code = """
import torch
from torch import nn

def net():
    dense = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return torch.ao.quantization.quantize_dynamic(dense, {nn.Linear})
"""
    (tmp_path / "nets.py").write_text(code)
    with pytest.raises(UnsupportedModel, match="0 is a quantised Linear"):
        load_source(f"{tmp_path}/nets.py:net", input_shapes=parse_input_shapes("input:1x8"))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_module_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nets.py"
    path.write_text(
        textwrap.dedent("""
        import torch
        def net():
            module = torch.nn.Linear(4, 4)
            weight = torch.quantize_per_tensor(module.weight.detach(), 0.1, 0, torch.qint8)
            del module.weight
            module.register_buffer("weight", weight)
            return module
        """)
    )
    with pytest.raises(UnsupportedModel, match="weight of Linear is quantised"):
        load_source(f"{path}:net", input_shapes=parse_input_shapes("input:1x4"))


def test_a_module_is_an_nn_module(nets: Path) -> None:
    source = load_source(f"{nets}:net", input_shapes=IMAGE)
    assert isinstance(source.blank(), nn.Module)
    assert source.recipe == {"kind": "factory", "factory": "nets.py:net"}
