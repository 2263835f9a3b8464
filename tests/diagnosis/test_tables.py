"""What is shown of a diagnosis: the worst first, every fault, and how much was left out."""

from __future__ import annotations

from dataclasses import replace

from phiconv.diagnosis.results import (
    Diagnosis,
    Fault,
    Finding,
    LayerError,
    OperatorError,
    Rung,
    TensorError,
)
from phiconv.diagnosis.tables import tables
from phiconv.report.results import Provenance, TokenSetRecord

WEIGHT = TensorError("mlp.up_proj", 0, "w", "int4 block 32", "t", (0, 8), 21.0, 21.5, "ok")
EXACT = TensorError("norm", None, "n", "f32", "t", (0, 8), None, None, "ok")
UNREAD = replace(EXACT, component="lm_head", status="unreadable", detail="3 bits")
WRONG = replace(WEIGHT, layer=1, sqnr_db=2.1, status="wrong", detail="is zero")
STEP = OperatorError("input_layernorm", 0, 1e-7, 1e-3, 4.0)
OVERFLOW = OperatorError("mlp.down_proj", 1, None, 1e-2, 6e4, "8 of 64 values overflow fp16")
DIAGNOSIS = Diagnosis(
    artifact="artifact",
    checkpoint="checkpoint",
    tokens=TokenSetRecord("default", 2, 48, "sha256:0", "sha256:1"),
    provenance=Provenance("onnxruntime", "1", "CPUExecutionProvider", "CPUExecutionProvider"),
    ladder=(
        Rung("reference", "fp32", True, 0.0, 0.0, 0.0, 1.0, 1.0),
        Rung("checkpoint dtype", "bf16", False, 1.234e-5, 0.1, 0.2, 0.987, 1.00456),
        Rung("graph", "the graph", True, None, None, None, None, None, "not finite"),
    ),
    layers=(LayerError(-1, 0.0), LayerError(0, 0.5, 0.0, 0.25, 0.1, None)),
    operators=(STEP, replace(STEP, layer=1, relative_error=5e-4), OVERFLOW),
    tensors=(EXACT, WEIGHT, UNREAD, WRONG),
    findings=(Finding("bias", "error", "lm_head", (), "a bias is added"),),
    faults=(Fault("graph", "lm_head", (), "a bias is added", ("lm_head: 0.5",)),),
    verdict="",
)


def rows(title: str, diagnosis: Diagnosis = DIAGNOSIS, shown: int = 12) -> list[tuple[str, ...]]:
    (table,) = [table for table in tables(diagnosis, shown=shown) if table.title == title]
    assert all(len(row) == len(table.columns) for row in table.rows)
    return list(table.rows)


def test_the_ladder_marks_the_yardstick_and_says_why_a_rung_has_no_figures() -> None:
    assert rows("Ladder") == [
        ("reference", "0", "0", "0", "100.0%", "1", "fp32"),
        ("(checkpoint dtype)", "1.23e-05", "0.1", "0.2", "98.7%", "1.005", "bf16"),
        ("graph", "-", "-", "-", "-", "-", "not finite"),
    ]


def test_layers_faults_and_findings() -> None:
    assert rows("Residual stream") == [
        ("embedding", "-", "0", "-", "-", "-"),
        ("0", "0", "0.5", "0.25", "0.1", "-"),
    ]
    assert rows("Faults") == [("graph", "lm_head", "a bias is added; lm_head: 0.5")]
    assert rows("Graph against config.json") == [("error", "lm_head", "-", "a bias is added")]


def test_the_worst_weights_and_steps_come_first() -> None:
    assert rows("Weights") == [
        ("layer 1, mlp.up_proj", "int4 block 32", "2.1", "21.5", "wrong: is zero"),
        ("layer 0, mlp.up_proj", "int4 block 32", "21.0", "21.5", "ok"),
        ("norm", "f32", "exact", "exact", "ok"),
        ("lm_head", "f32", "-", "-", "unreadable: 3 bits"),
    ]
    steps = rows("Steps")
    assert [row[0] for row in steps] == [
        "layer 1, mlp.down_proj",
        "layer 1, input_layernorm",
        "layer 0, input_layernorm",
    ]
    assert steps[0][1:] == ("-", "0.01", "6e+04", "8 of 64 values overflow fp16")


def test_no_fault_is_left_out_and_the_rest_is_counted() -> None:
    (weights,) = [table for table in tables(DIAGNOSIS, shown=0) if table.title == "Weights"]
    assert [row[0] for row in weights.rows] == ["layer 1, mlp.up_proj"]
    assert weights.note == "3 more weights are no worse"


def test_a_table_without_rows_is_not_shown() -> None:
    clean = replace(DIAGNOSIS, faults=(), findings=(), layers=(), operators=())
    assert [table.title for table in tables(clean)] == ["Ladder", "Weights"]
