"""A folder in; its digests and, with a key, its signature out; later, what of it was changed.

`digests.json` is the statement that OpenSSF's model signing signs (in-toto, a SHA-256 a file);
`model.sig`, from a private key and the extra [sign], is a signature by that library.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cwpo_dist.storage import Store

DIGESTS, SIGNATURE = "digests.json", "model.sig"
NO_FILE = "no regular file"  # what stands for its digest: a link leads elsewhere, a pipe never ends
_BLOCK = 2**22


class SigningError(ValueError):
    """A folder that cannot be signed or verified; the message names it and the remedy."""


@dataclass(frozen=True)
class Difference:
    """What a folder holds, against its digests; each a sorted list of names."""

    changed: tuple[str, ...]
    missing: tuple[str, ...]
    added: tuple[str, ...]

    def lines(self) -> list[str]:
        """One a file: what became of it, and its name."""
        kinds = {"changed": self.changed, "missing": self.missing, "added": self.added}
        return [f"{kind}: {name}" for kind, names in kinds.items() for name in names]


def write_digests(folder: Store) -> None:
    """Writes `digests.json`, of all other files of the folder."""
    folder.create_json(DIGESTS, _statement(folder.root.rsplit("/", 1)[-1], _digests(folder)))


def _statement(folder: str, found: Mapping[str, str]) -> dict[str, object]:
    """What says that a folder of that name has files of these digests."""
    root = hashlib.sha256(b"".join(bytes.fromhex(found[name]) for name in sorted(found)))
    resources = [
        {"name": name, "algorithm": "sha256", "digest": found[name]} for name in sorted(found)
    ]
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": folder, "digest": {"sha256": root.hexdigest()}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [DIGESTS, SIGNATURE],
            },
            "resources": resources,
        },
    }


def compare(folder: Store) -> Difference:
    """What of a folder is not as its digests say.

    Raises:
        SigningError: where it has none, or none that can be read.
    """
    if not folder.exists(DIGESTS):
        raise SigningError(
            f"{folder.uri}: no {DIGESTS}, which `cwpo export` writes; name the exported folder"
        )
    recorded = _recorded(folder)
    found = _digests(folder)
    both = recorded.keys() & found.keys()
    return Difference(
        tuple(sorted(name for name in both if recorded[name] != found[name])),
        tuple(sorted(recorded.keys() - found.keys())),
        tuple(sorted(found.keys() - recorded.keys())),
    )


def check_can_sign(folder: Store, private_key: Path) -> None:
    """Returns where `sign` can be expected to work; before much is copied.

    Raises:
        SigningError: for a folder that is not local, a key that is missing, or without [sign].
    """
    _local(folder)
    if not private_key.is_file():
        raise SigningError(f"--sign: no file {private_key}; give an EC private key (PEM)")


def sign(folder: Store, private_key: Path) -> None:
    """Writes `model.sig`: of all files of the folder, its digests among them.

    Raises:
        SigningError: as `check_can_sign`, and for a key that is none.
    """
    local = _local(folder)
    from model_signing import hashing, signing

    try:
        config = signing.Config().use_elliptic_key_signer(private_key=private_key)
        kept_out = hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
        config.set_hashing_config(kept_out).sign(local, local / SIGNATURE)
    except (OSError, ValueError, TypeError) as error:
        raise SigningError(
            f"--sign: {private_key}: {error}; give an EC private key (PEM)"
        ) from None


def verify_signature(folder: Store, public_key: Path) -> str | None:
    """None where the signature is that key's and of all that the folder holds; else what is not.

    Raises:
        SigningError: where there is no signature, no such key, or without [sign].
    """
    local = _local(folder)
    if not folder.exists(SIGNATURE):
        raise SigningError(f"--key: {folder.uri} has no {SIGNATURE}; export it with --sign")
    if not public_key.is_file():
        raise SigningError(f"--key: no file {public_key}; give the public key (PEM)")
    from model_signing import verifying

    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        config.verify(local, local / SIGNATURE)
    except Exception as error:  # noqa: BLE001 (of cryptography, protobuf and JSON: it is not verified)
        return f"{type(error).__name__}: {error}".removesuffix(": ")
    return None


def _local(folder: Store) -> Path:
    try:
        from model_signing import signing, verifying  # noqa: F401 (whether they are there)
    except ImportError:
        raise SigningError(
            "signatures need the extra [sign]: pip install 'cwpo_dist[sign]'"
        ) from None
    if not folder.is_local:
        raise SigningError(f"{folder.uri}: signatures are of local folders; copy it to one")
    return Path(folder.root)


def _recorded(folder: Store) -> dict[str, str]:
    """The digests that a folder came with."""
    statement = folder.read_json(DIGESTS)
    try:
        resources: list[Mapping[str, str]] = statement["predicate"]["resources"]
        recorded = {each["name"]: each["digest"] for each in resources}
        whole = statement == _statement(statement["subject"][0]["name"], recorded)
    except (LookupError, TypeError, ValueError, AttributeError):
        whole = False
    if not whole:  # a file twice, say: readers would not agree on which counts
        raise SigningError(
            f"{folder.path(DIGESTS)!r} is not a list of digests as `cwpo export` writes it; export "
            "the model again"
        )
    return recorded


def _digests(folder: Store) -> dict[str, str]:
    """SHA-256 by name of all that a folder holds, but for the digests and their signature."""
    folder.filesystem.invalidate_cache()
    start = len(folder.root) + 1
    found = _entries(folder.root) if folder.is_local else folder.filesystem.find(folder.root)
    digests = {name: _sha256(folder, name) for name in sorted(str(path)[start:] for path in found)}
    beside = [name for name in (DIGESTS, SIGNATURE) if digests.get(name) not in (None, NO_FILE)]
    return {name: digest for name, digest in digests.items() if name not in beside}


def _entries(root: str) -> Iterator[str]:
    """Files, links, pipes and whatever else is there that is no folder."""
    for parent, folders, names in os.walk(root):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        yield from (os.path.join(parent, name) for name in (*links, *names))


def _sha256(folder: Store, name: str) -> str:
    if folder.is_local and not stat.S_ISREG(os.lstat(folder.path(name)).st_mode):
        return NO_FILE
    digest = hashlib.sha256()
    with folder.filesystem.open(folder.path(name), "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
