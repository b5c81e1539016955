"""An exported folder in; the same as a repository of the Hugging Face hub, out.

Who pushes is known by huggingface_hub's own ways alone: HF_TOKEN, or what `hf auth login` kept.
"""

from __future__ import annotations

import shlex
from typing import Literal

from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it has it

from cwpo_dist import __version__
from cwpo_dist.storage import Store

PATIENCE = 300  # seconds without a sign of the hub, for which its client would wait without end
_REMEDIES = {
    401: "it does not know who pushes; give a token that may write (HF_TOKEN, or `hf auth login`)",
    402: "it wants to be paid for that; see the account's billing",
    403: "the token may not write there; take one with write access, or another owner",
    404: "there is no such owner, or the token may not see it; look at the name and the token",
    409: "another commit came in between; push again",
    413: "the folder is larger than it takes; see the account's storage",
    429: "it was asked too often; wait some minutes",
}


class PushError(RuntimeError):
    """A folder did not get to the hub; the message says why, and what brings it there."""


def check_name(repository: str, to: str) -> None:
    """Returns when a folder could be pushed there; before much is copied.

    Raises:
        PushError: for what is no name of a repository, or a folder that is not on this machine.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise PushError(f"--push: {error}; give OWNER/NAME, a name on the hub") from None
    if not Store(to).is_local:
        raise PushError(f"--push: uploads a folder of this machine; give a path for --to, not {to}")


def push(folder: str, repository: str, kind: Literal["model", "dataset"]) -> str:
    """Makes the repository, unless it is there, and commits after which it is this folder.

    A new one is private. One that is there stays as visible as it is and keeps its history; files
    that the folder has not are no longer in its last commit.

    Returns:
        The repository's URL.

    Raises:
        PushError: where the hub refuses, or does not answer.
    """
    api, folder = HfApi(), Store(folder).root  # of file://, too
    get_session().timeout = PATIENCE
    try:
        url = api.create_repo(repository, repo_type=kind, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            repo_type=kind,
            folder_path=folder,
            commit_message=f"Exported by cwpo_dist {__version__}",
            delete_patterns="*",
        )
    except Exception as error:  # of HTTP, its client, or hf_xet; raised again as ours
        again = ["hf", "upload", repository, folder, ".", "--repo-type", kind, "--private"]
        raise PushError(
            f"--push: {api.endpoint} has not taken {repository}: {_why(error)}. The export stays "
            f"in {folder}, and `{shlex.join([*again, '--delete', '*'])}` sends it"
        ) from error
    return str(url)


def _why(error: Exception) -> str:
    """What the hub, or the way to it, has against it, and the remedy."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    response = getattr(error, "response", None)
    code = getattr(response, "status_code", None)
    if code is None:
        kind = type(error).__name__
        return f"no answer ({kind}: {error}); look at the network and at HF_ENDPOINT"
    told = " ".join(str(getattr(error, "server_message", None) or "").split())
    remedy = _REMEDIES.get(code, "try again later")
    return f"{code}{f' ({told})' if told else ''}: {remedy}"
