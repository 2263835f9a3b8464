"""Compiled kernels on disk: found again, never older than the sources, beside them or not."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba.core.registry import cpu_target

import phiconv
from phiconv.kernels import floats, jit
from tests.kernels.matmulnbits_reference import quantize

PACKAGE = Path(phiconv.__file__).parent
CAST = """
import sys
import numpy as np
from phiconv.kernels import floats
out = np.empty(3, np.float16)
floats.cast_rows(np.float32([1, 2.5, -3]), out)
assert out.tolist() == [1, 2.5, -3]
print(floats.__file__, sum(floats._cast.stats.cache_hits.values()))
"""


def run(code: str, folder: Path, **environment: str) -> list[str]:
    """Runs Python code in `folder`, which comes first on the import path."""
    unset = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**unset, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_the_package_does_not_import_numba() -> None:
    code = "import phiconv.kernels, sys; print('numba' in sys.modules)"
    assert run(code, PACKAGE.parent) == ["False"]


def test_a_digest_changes_with_any_source_file(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = floats._cast._cache  # type: ignore[attr-defined]
    codegen = cpu_target.target_context.codegen()
    before = cache._digest("signature", codegen, b"code")
    assert cache._digest("signature", codegen, b"code") == before
    assert cache._digest("signature", codegen, b"cope") != before
    monkeypatch.setattr(jit, "_package_digest", lambda: "another")
    assert cache._digest("signature", codegen, b"code") != before


def test_the_digest_reads_every_source_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit, "__file__", str(tmp_path / "jit.py"))
    seen = set()
    for text in ("", "x = 1", "x = 2"):
        (tmp_path / "other.py").write_text(text)
        seen.add(jit._package_digest.__wrapped__())
    assert len(seen) == 3


@pytest.fixture
def unwritable(tmp_path: Path) -> Path:
    """A folder with a copy of the kernels that nothing can be cached beside."""
    copy = tmp_path / "site" / "phiconv"
    shutil.copytree(PACKAGE / "kernels", copy / "kernels", ignore=shutil.ignore_patterns("__py*"))
    (copy / "__init__.py").touch()
    # A file where the folder should be stops even a user who may write everywhere.
    (copy / "kernels" / "__pycache__").touch()
    return copy.parent


def at_home(home: Path) -> dict[str, str]:
    return dict.fromkeys(("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA", "USERPROFILE"), str(home))


def test_an_unwritable_package_is_cached_in_the_users_folder(
    unwritable: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    first = run(CAST, unwritable, **at_home(home))
    second = run(CAST, unwritable, **at_home(home))
    assert Path(first[0]).is_relative_to(unwritable)
    assert (first[1], second[1]) == ("0", "1")
    assert list(home.rglob("floats._cast*.nbc"))


def test_kernels_run_where_nothing_can_be_cached(unwritable: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.touch()
    assert run(CAST, unwritable, **at_home(home))[1] == "0"


def test_what_only_compiling_needs_is_neither_imported_nor_announced_for_loading(
    tmp_path: Path,
) -> None:
    imported = "print('numba.typed.typeddict' in sys.modules)"
    compiled_after_loading = """
out = np.empty((2, 1), np.float16)
floats.cast_transposed(np.float32([[1, 2]]), 0, 2, out)
assert out.tolist() == [[1], [2]]
"""
    announced = """
from phiconv.kernels import compiling
told = []
compiling.listen(told.append)
"""
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    told = announced + CAST + imported + "\nprint(*told)"
    assert run(told, PACKAGE.parent, **cache)[1:] == ["0", "True", *["None", "True", "None"]]
    assert run(told, PACKAGE.parent, **cache)[1:] == ["1", "False", "None"]
    both = CAST + imported + compiled_after_loading + imported
    assert run(both, PACKAGE.parent, **cache)[1:] == ["1", "False", "True"]


def flip_a_bit(content: bytes) -> bytes:
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]


def twice(value: int) -> int:
    return 2 * value


@pytest.fixture
def kept(tmp_path: Path) -> Any:
    """An empty cache, and machine code that was just compiled."""
    compiled: Any = jit._compiled(twice)
    assert compiled(21) == 42
    cache = jit._PackageCache(twice)  # type: ignore[no-untyped-call]
    cache._cache_path = str(tmp_path)
    return cache, next(iter(compiled.overloads.values()))


@pytest.mark.parametrize(
    "damage", [flip_a_bit, lambda content: content[:1000], lambda content: b""]
)
def test_damaged_machine_code_counts_as_none_and_is_replaced(
    damage: Callable[[bytes], bytes], kept: Any, tmp_path: Path
) -> None:
    cache, result = kept
    assert cache.load_overload(result.signature, cpu_target.target_context) is None
    for _ in range(2):
        cache.save_overload(result.signature, result)
        [file] = tmp_path.iterdir()
        loaded = cache.load_overload(result.signature, cpu_target.target_context)
        assert loaded.signature == result.signature
        file.write_bytes(damage(file.read_bytes()))
        assert cache.load_overload(result.signature, cpu_target.target_context) is None


def test_a_full_disk_costs_no_more_than_compiling_again(
    kept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache, result = kept
    monkeypatch.setattr(Path, "write_bytes", full)
    cache.save_overload(result.signature, result)
    assert list(tmp_path.iterdir()) == []


def digest() -> str:
    """sha256 of searched scales, zero points and codes."""
    weight = np.random.default_rng(0).standard_normal((16, 200)).astype(np.float32)
    out, _ = quantize(weight, bits=4, block_size=32, symmetric=False, search="mse", half=True)
    assert out.zero_points is not None
    return hashlib.sha256(b"".join(array.tobytes() for array in out)).hexdigest()


def test_bytes_do_not_depend_on_the_instruction_set(tmp_path: Path) -> None:
    """The widest vectors of this machine against a processor that has next to none."""
    code = "from tests.kernels.test_jit import digest; print(digest())"
    environment = {"NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)}
    assert run(code, PACKAGE.parent, **environment) == [digest()]
