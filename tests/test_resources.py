from __future__ import annotations

import gc
import threading

import pytest

from phiconv import resources
from phiconv.resources import without_collections


def test_collections_stop_and_go_on() -> None:
    assert gc.isenabled()
    with pytest.raises(ImportError), without_collections():
        assert not gc.isenabled()
        with without_collections():
            pass
        assert not gc.isenabled(), "the outer one decides"
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collections():
            assert not gc.isenabled()
        assert not gc.isenabled(), "the caller decides"
    finally:
        gc.enable()


def test_only_the_first_makes_objects_exempt(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.unfreeze()
    monkeypatch.setattr(resources, "_exempt", threading.Event())
    try:
        with without_collections():
            pass
        frozen = gc.get_freeze_count()
        assert frozen
        kept = [[] for _ in range(1000)]
        with without_collections():
            pass
        assert gc.get_freeze_count() <= frozen
        assert len(kept) == 1000
    finally:
        gc.unfreeze()
