"""The stages a recipe can name after `uses`: adding one is one file and one line here.

This is a module of its own, not `phiconv.stages` itself, so that importing one stage, or the
types in `phiconv.stages.stage`, does not import them all.
"""

from __future__ import annotations

from phiconv.stages.awq import Awq
from phiconv.stages.cast import Cast
from phiconv.stages.convert_gguf import ConvertGguf
from phiconv.stages.export_awq import ExportAwq
from phiconv.stages.export_onnx import ExportOnnx
from phiconv.stages.imatrix import Imatrix
from phiconv.stages.length_reference import LengthReference
from phiconv.stages.olive import Olive
from phiconv.stages.quantize import Quantize
from phiconv.stages.reference import Reference
from phiconv.stages.stage import ONNX_GRAPH, Stage
from phiconv.stages.validate import Validate
from phiconv.stages.write_onnx import WriteOnnx

STAGES: dict[str, Stage] = {
    "export-onnx": ExportOnnx(),
    "quantize": Quantize(),
    "cast": Cast(),
    "awq": Awq(),
    "export-awq": ExportAwq(),
    "write-onnx": WriteOnnx(),
    "olive": Olive(),
    "imatrix": Imatrix(),
    "convert-gguf": ConvertGguf(),
    "reference": Reference(),
    "length-reference": LengthReference(),
    "validate": Validate(),
}

WRITERS: dict[str, str] = {ONNX_GRAPH: "write-onnx"}
"""The stage that turns an artifact of a lazy kind into one that ships; the plan adds it."""
