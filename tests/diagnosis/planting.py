"""Plants faults in copies of ONNX artifacts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

Edit = Callable[[ir.Model], None]


def planted(artifact: Path, folder: Path, edit: Edit) -> Path:
    """A copy of an artifact with an edited graph or edited weights."""
    folder.mkdir()
    model = ir.load(artifact / "model.onnx")
    edit(model)
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    shutil.copy(artifact / "genai_config.json", folder)
    return folder


def change(model: ir.Model, name: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replaces the data of an initializer by a function of it."""
    value = model.graph.initializers[name]
    assert value.const_value is not None
    array = np.ascontiguousarray(function(value.const_value.numpy().copy()))
    value.const_value = ir.tensor(array, name=name)
    value.shape = ir.Shape(array.shape)


def node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def set_float(model: ir.Model, name: str, attribute: str, value: float) -> None:
    node(model, name).attributes[attribute] = ir.AttrFloat32(attribute, value)


def constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """A new initializer."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
    )
    model.graph.register_initializer(value)
    return value


def add_after(model: ir.Model, value: ir.Value, term: ir.Value) -> None:
    """Makes everything that reads `value` read `value + term`."""
    producer = value.producer()
    assert producer is not None
    users = list(value.uses())
    added = ir.node("Add", [value, term], name=f"{value.name}/planted")
    added.outputs[0].name = f"{value.name}/planted/output"
    added.outputs[0].type = value.type
    model.graph.insert_after(producer, added)
    for user, index in users:
        user.replace_input_with(index, added.outputs[0])


def drop_residual(model: ir.Model, name: str) -> None:
    """Makes a SkipSimplifiedLayerNormalization forget the residual stream it should add to."""
    skip = node(model, name)
    zero = constant(model, f"{name}/nothing", np.zeros(1, np.float32))
    nothing = ir.node("Mul", [skip.inputs[0], zero], name=f"{name}/planted")
    nothing.outputs[0].name = f"{name}/planted/output"
    model.graph.insert_before(skip, nothing)
    skip.replace_input_with(0, nothing.outputs[0])
