"""A site cut out with its surroundings computes what it computes inside the whole graph."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from tests.tiny_models import case, dense_graph, edit_of, everything, sliced, text
from zipc.core.errors import UnsupportedModel
from zipc.exporters.graph import OnnxGraph
from zipc.exporters.site_graph import extract
from zipc.exporters.specialise import Edit, Int8Weights, specialise
from zipc.numerics.int8 import quantize_weight

pytestmark = pytest.mark.xdist_group("encoders")
families = pytest.mark.parametrize(
    "family", ["bert", "bert-classifier", "distilbert", "albert", "mpnet"]
)


def run(model: bytes, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})


def values(graph: OnnxGraph, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Inner values of a whole graph."""
    inner = graph.copy()
    inner.proto = onnx.ModelProto()
    inner.proto.CopyFrom(graph.proto)
    del inner.proto.graph.output[:]
    for name in names:
        kind, shape = graph.types.get(name, onnx.TensorProto.FLOAT), graph.shapes.get(name, [1])
        inner.proto.graph.output.append(
            helper.make_tensor_value_info(name, kind, [None] * len(shape))
        )
    return run(inner.to_bytes(), feeds)


def edits(family: str, width: int, numeric: str, index: int) -> Edit:
    made = case(family)
    site = made.sites[index]
    kept = everything(made) | {site.name: list(range(width))}
    held: dict[str, Int8Weights] = {}
    if numeric != "fp32" and width:
        weights = made.weights | sliced(made, kept)[0]
        for path in site.maps:
            rounded = quantize_weight(weights[path + ".weight"])
            at = (0.05, 128) if numeric == "int8-static" else None
            held[path] = Int8Weights(rounded.values.numpy(), rounded.scale.numpy(), at)
    edit = edit_of(made, kept, held)
    return replace(
        edit,
        tensors={
            n: edit.tensors[n] for n in {s.parameter for s in site.slices} & set(edit.tensors)
        },
    )


@families
def test_a_cut_out_site_computes_its_part_of_the_whole(family: str) -> None:
    made = case(family)
    dense = dense_graph(family)
    feeds = {k: v.numpy() for k, v in text(family, batch=2, length=9).items()}
    for index, site in enumerate(made.sites):
        stops = extract(dense, site).outputs()
        whole, none = (site.units, "fp32"), (0, "fp32")
        for width, numeric in (whole, (3, "fp32"), (3, "int8-dynamic"), (3, "int8-static"), none):
            edit = edits(family, width, numeric, index)
            graph = specialise(dense, edit)
            part = specialise(extract(dense, site), edit, part=True)
            proto = part.to_proto()
            onnx.checker.check_model(proto)
            held = {t.name for t in proto.graph.initializer}
            names = [i.name for i in proto.graph.input if i.name not in held]
            assert not [name for name in names if name.endswith("_given")]
            given = dict(zip(names, values(graph, names, feeds), strict=True)) if names else {}
            for value in (i for i in proto.graph.input if i.name in given):
                dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
                sizes = given[value.name].shape
                assert all(d in (0, s) for d, s in zip(dims, sizes, strict=True))
            want = values(graph, stops, feeds)
            for got, expected in zip(run(part.to_bytes(), given), want, strict=True):
                np.testing.assert_allclose(
                    np.broadcast_to(got, expected.shape), expected, atol=1e-4
                )


@families
def test_a_cut_out_site_holds_the_site_and_little_else(family: str) -> None:
    made = case(family)
    dense = dense_graph(family)
    for site in made.sites:
        proto = extract(dense, site).to_proto()
        held = {i.name for i in proto.graph.initializer}
        mine = site.maps
        for call in made.program.maps:
            inside = dense.weights[call.weight][0] in held
            assert inside == (call.module in mine), (site.name, call.module)


def test_a_site_ends_with_the_norm_after_it() -> None:
    made = case("bert")
    dense = dense_graph("bert")
    producers = dense.producers()
    for site in made.sites:
        part = extract(dense, site)
        (stop,) = part.outputs()
        assert producers[stop].op_type == "LayerNormalization"


def test_a_site_that_is_not_in_the_graph_is_an_error() -> None:
    made = case("bert")
    dense = dense_graph("bert").copy()
    name = dense.weights[made.sites[0].producers[0] + ".weight"][0]
    dense.nodes = [n for n in dense.nodes if name not in n.input]
    with pytest.raises(UnsupportedModel, match="has no node"):
        extract(dense, made.sites[0])
