"""Uploads a release to the Hugging Face Hub: what is there, what is to go there, and the upload."""

from __future__ import annotations

from phiconv.push.files import PushFile, release_files
from phiconv.push.repository import Remote, Target, look_up
from phiconv.push.upload import Pushed, PushPlan, plan_push, push

__all__ = [
    "PushFile",
    "PushPlan",
    "Pushed",
    "Remote",
    "Target",
    "look_up",
    "plan_push",
    "push",
    "release_files",
]
