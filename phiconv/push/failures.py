"""What huggingface_hub's failures mean to who pushes a release."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from phiconv.errors import EnvironmentLacksError, PhiconvError, StageError

LOG_IN = "run `hf auth login`, or set HF_TOKEN to a token that may write to it"
_CARD = "README.md"
_AGAIN = "run the same command again: what is uploaded already is not uploaded twice"


def no_token(repo_id: str) -> PhiconvError:
    """Nobody is logged in."""
    return _lacks("there is no Hugging Face token on this machine", repo_id, LOG_IN)


def offline(repo_id: str) -> PhiconvError:
    """The Hub may not be used."""
    message = "HF_HUB_OFFLINE forbids to use the Hub"
    return _lacks(message, repo_id, "unset HF_HUB_OFFLINE")


def _lacks(message: str, repo_id: str, remedy: str) -> EnvironmentLacksError:
    return EnvironmentLacksError(message, where=repo_id, remedy=remedy)


@contextmanager
def translated_failures(repo_id: str) -> Iterator[None]:
    """Turns what huggingface_hub and its uploader raise into errors with a remedy.

    Raises:
        EnvironmentLacksError: The Hub refuses, or cannot be reached.
        StageError: The Hub does not take the model card's front matter.
    """
    import httpx2

    try:
        yield
    except ValueError as error:
        if not isinstance(error, httpx2.HTTPError) and _CARD not in str(error):
            raise
        raise _translated(error, repo_id) from error
    # hf_xet raises RuntimeError for whatever breaks off a transfer
    except (httpx2.HTTPError, OSError, RuntimeError) as error:
        raise _translated(error, repo_id) from error


def _translated(error: Exception, repo_id: str) -> PhiconvError:
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return offline(repo_id)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        # The Hub answers with 401 for what a stranger may not see, and then it counts as missing.
        if status == 401:
            return _lacks("the token is not valid", repo_id, LOG_IN)
        if isinstance(error, RepositoryNotFoundError):
            return _lacks("the token may not see the repository", repo_id, LOG_IN)
        if status == 403:
            message = f"the token may not do this: {_reason(error)}"
            return _lacks(message, repo_id, "give it the right to write, or use another: " + LOG_IN)
        if status == 412:
            message = "the repository was changed while the release was uploaded"
            return _lacks(message, repo_id, "look at what changed, then push again")
        return _lacks(f"the Hub refused: {_reason(error)}", repo_id, _AGAIN)
    if isinstance(error, ValueError):
        words = " ".join(str(error).split())
        return StageError(
            f"the Hub does not take the model card: {words}",
            where=_CARD,
            remedy="this is a defect of phiconv; please report it",
        )
    reason = _first_line(error.__cause__ or error)
    if isinstance(error, httpx2.ConnectError):
        message = f"{constants.ENDPOINT} cannot be reached: {reason}"
        return _lacks(message, repo_id, "check the network and HF_ENDPOINT; then " + _AGAIN)
    return _lacks(f"the upload to {constants.ENDPOINT} broke off: {reason}", repo_id, _AGAIN)


def _reason(error: Exception) -> str:
    """The server's own words, where it has some."""
    said = getattr(error, "server_message", None)
    return str(said) if said else _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
