"""The real command line on the toy stages, for tests that kill or interrupt it.

Usage: python -m tests.toy_cli PAUSE PART_BYTES ARGUMENTS...; PAUSE is the seconds that writing a
quarter of a part takes.
"""

from __future__ import annotations

import sys

from phiconv.cli import main
from phiconv.stages.registry import STAGES
from tests.toy_stages import WriteOnnx, registry

if __name__ == "__main__":
    writer = WriteOnnx(parts=3, part_bytes=int(sys.argv[2]), pause=float(sys.argv[1]))
    STAGES.clear()
    STAGES.update(registry(write_onnx=writer))
    main(sys.argv[3:])
