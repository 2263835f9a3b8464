"""Diagnosis: how far an ONNX artifact is from its checkpoint, and where the error enters.

`diagnose` reads any decoder that the ONNX Runtime GenAI model builder, phiconv or a similar tool
made, and returns a `Diagnosis`: a ladder of stages, the error of every layer, step and weight, what
the graph says otherwise than the configuration, and the faults that follow.
"""

from __future__ import annotations

from phiconv.diagnosis.results import (
    Diagnosis,
    Fault,
    Finding,
    LayerError,
    OperatorError,
    Rung,
    TensorError,
)

__all__ = [
    "Diagnosis",
    "Fault",
    "Finding",
    "LayerError",
    "OperatorError",
    "Rung",
    "TensorError",
]
