"""Downloads checkpoints from the Hugging Face Hub into its standard cache.

huggingface_hub reads the environment: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_HUB_OFFLINE and
HF_TOKEN mean here what they mean everywhere.
"""

from __future__ import annotations

import errno
import glob
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phiconv.checkpoint.adapter import ADAPTER_CONFIG
from phiconv.checkpoint.digests import OnBytes
from phiconv.checkpoint.folder import CARD, SHAPING_PATTERNS
from phiconv.checkpoint.weights import INDEX_FILE, SINGLE_FILE, no_weights, read_weight_map
from phiconv.errors import EnvironmentLacksError, PhiconvError, RecipeError, noted_when_stopped

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit, in the cache.

    Attributes:
        repo_id: Such as "microsoft/Phi-3-mini-4k-instruct".
        commit: 40 hexadecimal digits.
        path: The folder of its files; those not downloaded are absent.
    """

    repo_id: str
    commit: str
    path: Path


def fetch_metadata(repo_id: str, revision: str | None, *, download: bool = True) -> Snapshot:
    """Fetches everything but the weights, and pins the revision to its commit.

    Args:
        repo_id: The repository on the Hub.
        revision: A branch, tag or commit; by default the main branch.
        download: False uses the cache alone.

    Returns:
        The snapshot. What is in the cache is not downloaded again, and a commit that is all
        there needs no network.

    Raises:
        EnvironmentLacksError: The repository or revision does not exist, is not accessible, or
            is not in the cache and the Hub cannot be reached.
        RecipeError: `repo_id` is no valid id.
    """
    from huggingface_hub import HfApi, snapshot_download

    with _translated_errors(repo_id, revision):
        commit = (
            HfApi(library_name="phiconv")
            .resolve_revision(repo_id, revision=revision, local_files_only=not download)
            .resolved
        )
        path = snapshot_download(
            repo_id,
            revision=commit,
            allow_patterns=[*SHAPING_PATTERNS, INDEX_FILE, CARD, ADAPTER_CONFIG],
            ignore_patterns="*/*",
            local_files_only=not download,
            library_name="phiconv",
            tqdm_class=_progress_class(None),
        )
    return Snapshot(repo_id, commit, Path(path))


def fetch_weights(
    snapshot: Snapshot, *, download: bool = True, on_bytes: OnBytes | None = None
) -> None:
    """Fetches the safetensors files of a snapshot: `model.safetensors`, or those of its index.

    Args:
        snapshot: What `fetch_metadata` returned.
        download: False uses the cache alone.
        on_bytes: Called, from any thread, with counts of bytes downloaded.

    Raises:
        CheckpointError: The repository has no safetensors weights, or its index is malformed.
        EnvironmentLacksError: The files are not in the cache and cannot be downloaded, or the
            disk has no room for them.
    """
    from huggingface_hub import snapshot_download

    sizes = _file_sizes(snapshot)
    names = _weight_names(snapshot, sizes)
    absent = [name for name in names if not (snapshot.path / name).exists()]
    if not absent:
        return
    total = sum(sizes[name] for name in absent if name in sizes)
    if not download:
        raise EnvironmentLacksError(
            f"{len(absent)} weight files ({_gigabytes(total)}) are not downloaded yet",
            where=_place(snapshot.repo_id, snapshot.commit),
            remedy=f"run `hf download {snapshot.repo_id} --revision {snapshot.commit}`",
        )
    _check_disk(snapshot, total)
    kept = noted_when_stopped("what was downloaded is kept; the next build goes on from there")
    with kept, _translated_errors(snapshot.repo_id, snapshot.commit):
        snapshot_download(
            snapshot.repo_id,
            revision=snapshot.commit,
            allow_patterns=[glob.escape(name) for name in names],
            library_name="phiconv",
            tqdm_class=_progress_class(on_bytes),
        )


def fetch_dataset_file(repo_id: str, commit: str, name: str) -> Path:
    """Fetches one file of a dataset.

    Args:
        repo_id: The dataset on the Hub.
        commit: 40 hexadecimal digits.
        name: The file, within the repository.

    Returns:
        Where it is in the cache; what is there needs no network.

    Raises:
        EnvironmentLacksError: There is no such file, it is not accessible, or it is not in the
            cache and the Hub cannot be reached.
        RecipeError: `repo_id` is no valid id.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        with _translated_errors(f"datasets/{repo_id}", commit):
            return Path(
                hf_hub_download(
                    repo_id,
                    name,
                    repo_type="dataset",
                    revision=commit,
                    library_name="phiconv",
                    tqdm_class=_progress_class(None),
                )
            )
    except EnvironmentLacksError as error:
        if isinstance(error.__cause__, RemoteEntryNotFoundError):
            raise EnvironmentLacksError(
                f"this dataset has no file {name}",
                where=_place(f"datasets/{repo_id}", commit),
                remedy="see its files on the Hub",
            ) from error.__cause__
        raise


def _file_sizes(snapshot: Snapshot) -> dict[str, int]:
    """Name and bytes of every file of the repository, or of those in the cache."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = get_cached_repo_tree(snapshot.repo_id, revision=snapshot.commit)
        return {file.path: file.size for file in tree}
    except CachedRepoTreeNotFoundError:
        # downloaded by an older huggingface_hub, which kept no listing
        files = (path for path in snapshot.path.iterdir() if path.is_file())
        return {path.name: path.stat().st_size for path in files}


def _weight_names(snapshot: Snapshot, sizes: dict[str, int]) -> list[str]:
    if SINGLE_FILE in sizes:
        return [SINGLE_FILE]
    if INDEX_FILE in sizes:
        return sorted(set(read_weight_map(snapshot.path / INDEX_FILE).values()))
    raise no_weights(sizes, _place(snapshot.repo_id, snapshot.commit))


def _check_disk(snapshot: Snapshot, needed: int) -> None:
    free = shutil.disk_usage(snapshot.path).free
    if free < needed:
        raise EnvironmentLacksError(
            f"downloading needs {_gigabytes(needed)}, but only {_gigabytes(free)} are free",
            where=str(snapshot.path),
            remedy="free some space, or set HF_HOME to a folder on a larger disk",
        )


def _progress_class(on_bytes: OnBytes | None) -> Any:
    """A tqdm that shows nothing and hands on the bytes that reach the disk.

    huggingface_hub makes several bars of the class it is given: it counts files with one, and
    bytes received and bytes written with two others, of which the first is named so.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    class DownloadProgress(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **(kwargs | {"disable": True}))
            written = kwargs.get("unit") == "B" and kwargs.get("desc") != "Downloading bytes"
            self._on_bytes = on_bytes if written else None

        def update(self, n: float | None = 1) -> None:
            if self._on_bytes and n:
                self._on_bytes(int(n))

    return DownloadProgress


@contextmanager
def _translated_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    import httpx2
    from huggingface_hub.errors import HFValidationError, RevisionResolutionError, XetDownloadError

    try:
        with warnings.catch_warnings():
            # Windows lets only the privileged make links; the cache does without them.
            warnings.filterwarnings("ignore", message=".*cache-system uses symlinks")
            yield
    except HFValidationError as error:
        raise RecipeError(
            f"'{repo_id}' is neither a folder nor a valid Hugging Face id: {error}",
            where="model.source",
            remedy="give a folder, or an id such as microsoft/Phi-3-mini-4k-instruct",
        ) from error
    except (httpx2.HTTPError, RevisionResolutionError, XetDownloadError, OSError) as error:
        raise _translated(error, repo_id, revision) from error


def _translated(error: Exception, repo_id: str, revision: str | None) -> PhiconvError:
    """What an error of huggingface_hub means to the user."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        RevisionResolutionError,
    )

    place = _place(repo_id, revision)
    page = f"{constants.ENDPOINT}/{repo_id}"

    def lacks(message: str, remedy: str) -> EnvironmentLacksError:
        return EnvironmentLacksError(message, where=place, remedy=remedy)

    if isinstance(error, GatedRepoError):
        return lacks(
            "access to this model is gated",
            f"accept its terms at {page}, then run `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, RepositoryNotFoundError):
        return lacks(
            f"there is no such folder, and no such model at {constants.ENDPOINT}",
            "check the spelling; for a private model run `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, RevisionNotFoundError):
        return lacks("this model has no such revision", f"see {page}/commits for what there is")
    if isinstance(error, DisabledRepoError):
        return lacks("access to this model has been disabled", f"see {page}")
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return lacks(
            f"the disk of the Hugging Face cache is full ({constants.HF_HUB_CACHE})",
            "free some space, or set HF_HOME to a folder on a larger disk",
        )
    if isinstance(error, OSError) and error.errno is not None:
        return lacks(
            f"the Hugging Face cache cannot be used: {error}",
            "make it readable and writable, or set HF_HOME to another folder",
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return lacks(
            f"access was denied: {error}", "run `hf auth login` or set HF_TOKEN to a valid token"
        )
    if constants.HF_HUB_OFFLINE:
        return lacks(
            "this model is not (all) in the cache, and HF_HUB_OFFLINE forbids to download it",
            f"unset HF_HUB_OFFLINE, or run `hf download {repo_id}` where there is a network",
        )
    if isinstance(error, LocalEntryNotFoundError | RevisionResolutionError) and not error.__cause__:
        return lacks(
            "this model is not in the cache",
            f"run `hf download {repo_id}`, or give the folder of a copy",
        )
    return lacks(
        f"{constants.ENDPOINT} cannot be reached: {error.__cause__ or error}",
        "check the network and HF_ENDPOINT, or give the folder of a copy",
    )


def _place(repo_id: str, revision: str | None) -> str:
    return f"{repo_id}@{revision}" if revision else repo_id


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
