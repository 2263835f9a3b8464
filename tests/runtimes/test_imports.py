"""transformers is imported by two threads: beside hashing, and by the stage that comes first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.phi3_checkpoints import write_phi3_checkpoint

PROGRAM = """
import sys, threading
import torch
from phiconv.checkpoint import Checkpoint
from phiconv.runtimes.reference import hugging_face_config, modeling_module

checkpoint = Checkpoint(sys.argv[1])
together = threading.Barrier(2)

def beside_hashing():
    together.wait()
    modeling_module()

thread = threading.Thread(target=beside_hashing)
thread.start()
together.wait()
print(hugging_face_config(checkpoint).model_type)
thread.join()
"""


def test_two_threads_get_the_whole_of_transformers(tmp_path: Path) -> None:
    checkpoint = write_phi3_checkpoint(tmp_path)
    command = [sys.executable, "-c", PROGRAM, str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "phi3"), done.stderr
