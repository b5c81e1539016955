"""What a run is told, or what a library says, in; whether a credential stands in it, out.

A configuration is written into manifests, rows and reports, and a library's error may repeat the
URL that it could not read. So a credential in the one is refused, and in the other hidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import unquote

HIDDEN = "***"
_MOST_FORMS = 8  # of a text; nobody takes off quotes more often
REMEDY = (
    "a credential stands there, and a configuration is written into manifests, rows and reports. "
    "Take it out and give it by the environment: HF_TOKEN, AWS_PROFILE or AWS_ACCESS_KEY_ID with "
    "its key, WANDB_API_KEY, for URLs FSSPEC_HTTPS (SECURITY.md shows how)"
)
# What makes a name that of a secret, as a word of it or written together with the word before.
_SECRET_WORDS = re.compile(
    r"token|secret|pass(word|wd|phrase)?|pwd?|sig(nature)?|credentials?|auth(orization)?|bearer|jwt|"
    r"otp|hmac|cookie|sas|\w*(token|secret|password|apikey|accesskey|accountkey|sessionid)"
)
# Signed URLs carry their whole signature in parameters of the signer's own.
_SIGNERS = (["x", "amz"], ["x", "goog"], ["x", "ms"])
# Also names of partitions and columns: that of a secret in a query or a section, not in a path.
_AMBIGUOUS = {"key", "sig", "auth", "pass", "sas"}
# Kinds of places in whose URIs a name before `@` is no password: a container, a user, a revision.
_NAMED_BEFORE_AT = "abfs|abfss|adl|az|wasb|wasbs|sftp|ssh|scp|smb|hdfs|webhdfs|hf|git"

# Of all that may begin anywhere the length is bounded: without that a long text takes for ever.
_CREDENTIALS = tuple(
    re.compile(pattern)
    for pattern in (
        # A user, a colon, a password and @, behind a scheme, in a chain of them, or alone. GitHub's
        # URIs name owner and repository so.
        r"(?:^|(?<=[\s\"'=(\[,/\\])|(?<=::))(?<!github://)"
        r"[^\s\"'=(\[,:/\\?#]{0,256}:(?!:)[^\s\"'/\\?#]{1,1024}@(?=[\w\[])",
        # scheme://user:pass/word@host: what follows a host's colon is else a port.
        r"(?<=://)(?<!github://)[^\s\"'/\\?#@:\[\]]{1,256}:(?!:|\d*(?:[/\\?#]|$))"
        r"[^\s\"'@]{0,1024}@(?=[\w\[])",
        # scheme://token@host.
        rf"\b(?P<kept>(?!(?:{_NAMED_BEFORE_AT}|github):)[A-Za-z][\w+.-]{{0,40}}:[/\\]{{2,}})"
        r"(?!\*\*\*@)[^\s\"'/\\?#@]{1,4096}@",
        # Credentials that say what they are.
        r"\b(?:(?:hf|api_org|r8|gsk|npm|[sr]k_live|dop_v1|gh[oprsu])_[A-Za-z0-9]{20,}|"
        r"(?:AKIA|ASIA)[A-Z0-9]{16}|github_pat_\w{20,}|(?:glpat|nvapi)-[\w-]{16,}|"
        r"sk-(?:(?:ant|proj|svcacct|admin|or)-[\w-]{20,}|[A-Za-z0-9]{24,})|pypi-[\w-]{40,}|"
        r"dapi[0-9a-f]{32}|ya29\.[\w-]{20,}|SG\.[\w-]{16,}\.[\w-]{16,}|"
        r"xox[abps]-[\w-]{10,}|AIza[\w-]{30,}|eyJ[\w-]{8,4096}\.eyJ[\w-]{8,4096}\.[\w-]*)",
        r"\b(?P<kept>(?:[Bb]earer|[Bb]asic) +)[\w.~+/-]{12,}=*",
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*",
    )
)
# name=value; or, as a mapping is shown, 'name': 'value'.
_PARAMETER = re.compile(
    r"(?P<before>^|[?&;#/\s,\"'({-])(?P<name>[A-Za-z][\w.-]{0,128})(?P<is>=[\"']?|[\"']\s*:\s*[\"'])"
    r"(?P<value>[^&;#\s\"']+)"
)


def is_secret_name(name: str) -> bool:
    """Whether what goes by this name is a secret: api_key, X-Amz-Signature, sessionToken."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()
    words = [word for word in re.split(r"[^a-z0-9]+", apart) if word]
    if not words:
        return False
    keys = words[-1] == "key" or {"access", "key"} <= set(words)
    return keys or words[:2] in _SIGNERS or any(map(_SECRET_WORDS.fullmatch, words))


def has_credential(text: str) -> bool:
    """Whether a credential stands in a text, be it written with %40, or %2540, for @."""
    return any(_hidden(form) != form for form in _forms(text))


def redacted(text: str) -> str:
    """A text with `***` for each credential in it."""
    return _hidden(_forms(text)[-1]) if has_credential(text) else text


def _forms(text: str) -> list[str]:
    """The text as it is, and as it reads with less and less of it quoted."""
    forms = [text]
    while len(forms) < _MOST_FORMS and (plain := unquote(forms[-1])) != forms[-1]:
        forms.append(plain)
    return forms


def first_credential(value: object) -> str | None:
    """The dotted place of a credential in nested sections and lists; None where there is none."""
    found = (place for place, name, leaf in _leaves(value) if _is_credential(name, leaf))
    return next(found, None)


def _leaves(value: object) -> Iterator[tuple[str, str, object]]:
    """Place, nearest name and value of all that is no section or list, keys of sections too.

    Each object once: YAML's aliases can name one many times over, or in itself.
    """
    seen: set[int] = set()
    left: list[tuple[str, str, object]] = [("", "", value)]
    while left:
        place, name, value = left.pop()
        if not isinstance(value, Mapping | list | tuple | set):
            yield place, name, value
        elif id(value) not in seen:
            seen.add(id(value))
            left += reversed(list(_below(place, name, value)))


def _below(place: str, name: str, value: Iterable[object]) -> Iterator[tuple[str, str, object]]:
    if not isinstance(value, Mapping):
        yield from ((f"{place}.{k}".lstrip("."), name, each) for k, each in enumerate(value))
        return
    for key, each in value.items():
        below = f"{place}.{redacted(str(key))}".lstrip(".")
        yield below, "", str(key)
        yield below, str(key), each


def _is_credential(name: str, leaf: object) -> bool:
    if isinstance(leaf, str) and has_credential(leaf):
        return True
    unsaid = leaf is None or isinstance(leaf, bool) or leaf in ("", "auto")
    return is_secret_name(name) and not unsaid


def _hidden(text: str) -> str:
    for pattern in _CREDENTIALS:
        text = pattern.sub(_replaced, text)
    return _PARAMETER.sub(_parameter, text)


def _replaced(found: re.Match[str]) -> str:
    kept = found.groupdict().get("kept") or ""
    return f"{kept}{HIDDEN}{'@' if found[0].endswith('@') else ''}"


def _parameter(found: re.Match[str]) -> str:
    asked = found["before"] and found["before"] in "?&;#"
    name = found["name"]
    if not is_secret_name(name) or (name.lower() in _AMBIGUOUS and not asked):
        return found[0]
    return f"{found['before']}{name}{found['is']}{HIDDEN}"
