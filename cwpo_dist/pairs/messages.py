"""Any spelling of a conversation in, our messages out: role, content, and what templates read.

Messages are objects with role and content (OpenAI, TRL), or from and value (ShareGPT); roles have
the names that people give them; content is text, or parts that are text alone. A message that
calls a tool may have no content. What of a message nothing reads is named.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import date, datetime, time
from decimal import Decimal

from cwpo_dist.pairs.records import MESSAGE_KEYS, TEXT_KEYS, Message, Text, Tools
from cwpo_dist.pairs.rejects import BadRow, Reason, shown
from cwpo_dist.pairs.written import (
    CONTENT_KEYS,
    ROLE_KEYS,
    TEXT_PARTS,
    decoded,
    is_parts,
    messages_in,
    parts_in,
)

_NAMES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "ai", "bot", "chatbot", "chatgpt", "bard", "bing"),
    "system": ("system",),
    "developer": ("developer",),
    "tool": ("tool", "observation", "function", "function_response", "tool_response", "ipython"),
}
ROLES = {name: role for role, names in _NAMES.items() for name in names}
CALLS = ("function_call", "tool_call")  # roles whose content is a call of the assistant's, as JSON
_PLAIN = {"role", "content"}


class MessageReader:
    """Reads the conversations of one row.

    Attributes:
        unread: names of what its messages hold and nothing reads.
    """

    def __init__(self, *, nulls_are_absent: bool = False) -> None:
        """Begins a row.

        Args:
            nulls_are_absent: whether a null inside tools and calls stands for a key that is not
                there: Arrow gives all objects of a column the keys of every one.
        """
        self.nulls_are_absent = nulls_are_absent
        self.unread: set[str] = set()

    def read(self, value: object, name: str, role: str) -> list[Message]:
        """The messages of a cell; a string becomes one message of `role`.

        Raises:
            BadRow: for what is no conversation, with what stood there.
        """
        if isinstance(value, str):
            return [{"role": role, "content": checked(value, name)}]
        items = [value] if isinstance(value, Mapping) else value
        if is_parts(items):
            return [{"role": role, "content": self._text(items, name)}]
        if not isinstance(items, list):
            raise BadRow(Reason.TYPE, name, shown(value))
        if not items:
            empty = Reason.EMPTY_PROMPT if name == "prompt" else Reason.EMPTY_ANSWER
            raise BadRow(empty, "" if name == "prompt" else name)
        return [self._message(item, name) for item in items]

    def tools(self, value: object) -> Tools | None:
        """The tools that stand beside a conversation; None for none.

        Raises:
            BadRow: for what is no list of tools.
        """
        given = _unwritten(value, "tools")
        listed = [given] if isinstance(given, Mapping) else given
        if listed is None or listed == []:
            return None
        if not isinstance(listed, list):
            raise BadRow(Reason.TOOLS, "tools", shown(value))
        return [self._function(_unwritten(tool, "tools"), "tools") for tool in listed]

    def _message(self, item: object, name: str) -> Message:
        if isinstance(item, dict) and item.keys() == _PLAIN:  # as most are: no time to lose
            role, content = item["role"], item["content"]
            if isinstance(role, str) and role in ROLES and isinstance(content, str):
                return {"role": ROLES[role], "content": self._text(content, name)}
        # Of a list of messages, each may be written as text.
        return self._of_any_spelling(messages_in(item) if isinstance(item, str) else item, name)

    def _of_any_spelling(self, item: object, name: str) -> Message:
        given, role_key, content_key = _given(item, name)
        extra = self._extra(given, name)
        role, content = given[role_key], given.get(content_key or "")
        spelled = role.strip().lower() if isinstance(role, str) else ""
        if spelled in CALLS:
            extra["tool_calls"] = self._calls(content, name)
            spelled, content = "assistant", None
        if spelled not in ROLES:
            raise BadRow(Reason.ROLE, name, f"{role_key} {shown(role)}")
        if content is None and not extra.get("tool_calls"):
            raise BadRow(Reason.CONTENT, name)
        read = {role_key, content_key, *MESSAGE_KEYS, "function_call"}
        self.unread |= given.keys() - read
        text = None if content is None else self._text(content, name)
        return {"role": ROLES[spelled], "content": text, **extra}

    def _extra(self, given: Mapping[str, object], name: str) -> Message:
        """What templates read beside role and content."""
        extra: Message = {}
        for key in MESSAGE_KEYS:
            value = given.get(key)
            if value is None or value == []:
                continue
            if key in TEXT_KEYS and not isinstance(value, str):
                raise BadRow(Reason.NOT_TEXT, name, f"{key}: {shown(value)}")
            read = self._calls if key == "tool_calls" else self._json
            extra[key] = read(value, name)
        if "function_call" in given and "tool_calls" not in extra:  # OpenAI's older spelling
            extra["tool_calls"] = self._calls(given["function_call"], name)
        return extra

    def _calls(self, value: object, name: str) -> Tools:
        given = _unwritten(value, name)
        listed = [given] if isinstance(given, Mapping) else given
        if not isinstance(listed, list) or not listed:
            raise BadRow(Reason.TOOLS, name, shown(value))
        return [self._function(_unwritten(call, name), name) for call in listed]

    def _function(self, value: object, name: str) -> dict[str, object]:
        """A tool or a call as OpenAI and transformers spell it: `{type, function: {name, …}}`."""
        if not isinstance(value, Mapping):
            raise BadRow(Reason.TOOLS, name, shown(value))
        function = value.get("function")
        if value.get("type") in (None, "function"):
            bare = function is None
            function = {k: v for k, v in value.items() if k != "type"} if bare else function
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise BadRow(Reason.TOOLS, name, shown(value))
            value = {"type": "function", "function": function} if bare else value
        made = self._json(value, name)
        assert isinstance(made, dict), "JSON of an object is one"
        return made

    def _json(self, value: object, name: str) -> object:
        made = as_json(value, name)
        return _without_nulls(made) if self.nulls_are_absent else made

    def _text(self, content: object, name: str) -> str:
        """A content's text: its own, or that of its parts one behind the other."""
        if isinstance(content, str):
            written = parts_in(content) if content.startswith("[") else None
            if written is None:
                return checked(content, name)
            content = written
        parts = [content] if isinstance(content, Mapping) else content
        if not isinstance(parts, list):
            raise BadRow(Reason.NOT_TEXT, name, f"content: {shown(content)}")
        return "".join(self._part(part, name) for part in parts)

    def _part(self, part: object, name: str) -> str:
        if isinstance(part, str):
            return checked(part, name)
        if not isinstance(part, Mapping):
            raise BadRow(Reason.NOT_TEXT, name, f"a part of the content: {shown(part)}")
        kind, text = part.get("type"), part.get("text")
        if kind is not None and kind not in TEXT_PARTS:
            raise BadRow(Reason.MEDIA, name, f"a part of type {shown(kind)}")
        if not isinstance(text, str):
            raise BadRow(Reason.NOT_TEXT, name, f"a part of the content: {shown(part)}")
        others = (k for k, v in part.items() if v is not None and k not in ("type", "text"))
        self.unread.update(f"content.{key}" for key in others)
        return checked(text, name)


_SAYING = {*CONTENT_KEYS, *MESSAGE_KEYS, "function_call"}


def _given(item: object, name: str) -> tuple[dict[str, object], str, str | None]:
    """What a message holds but its nulls, and its keys for role and content."""
    if not isinstance(item, Mapping):
        raise BadRow(Reason.KEYS, name, shown(item))
    given = {key: value for key, value in item.items() if value is not None}
    role_key = next((key for key in ROLE_KEYS if key in given), None)
    if role_key is None or not (given.keys() | item.keys()) & _SAYING:
        raise BadRow(Reason.KEYS, name, shown(item))
    return given, role_key, next((key for key in CONTENT_KEYS if key in given), None)


def _unwritten(value: object, name: str) -> object:
    """What a text spells where a list or an object is wanted; an empty one spells nothing."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return decoded(value)
    except ValueError:
        raise BadRow(Reason.TOOLS, name, shown(value)) from None


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def checked(text: str, name: str) -> str:
    """The text, unless no file could hold it (JSON can spell lone surrogates).

    Raises:
        BadRow: for such a text.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(Reason.UNICODE, name) from None
    return text


def as_json(value: object, name: str, wrong: Reason = Reason.TYPE) -> object:
    """A value as JSON has it; dates and decimals by their usual spelling.

    Raises:
        BadRow: for a value that JSON cannot hold, which is what is `wrong`.
    """
    try:
        text = json.dumps(value, default=_spelled, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(Reason.UNICODE, name) from None
    except (TypeError, ValueError, RecursionError):
        raise BadRow(wrong, name, shown(value)) from None
    return json.loads(text)


def _spelled(value: object) -> str:
    if isinstance(value, date | datetime | time | Decimal):
        return str(value)
    raise TypeError(type(value).__name__)


def has_words(text: Text) -> bool:
    """Whether a prompt or answer says or calls anything."""
    if isinstance(text, str):
        return bool(text.strip())
    return any(_says(message) for message in text)


def _says(message: Message) -> bool:
    content = message["content"]
    if content and not content.isspace():
        return True
    said = (message.get(key) for key in _THINKING)
    return bool(message.get("tool_calls")) or any(each and each.strip() for each in said)


_THINKING = ("reasoning_content", "reasoning", "thinking")


def plain_text(text: Text) -> str:
    """A prompt or answer as one string; messages are joined by blank lines."""
    return text if isinstance(text, str) else "\n\n".join(map(message_text, text))


def message_text(message: Message) -> str:
    """What a message says: its content, and its tool calls as JSON behind it."""
    calls = message.get("tool_calls")
    spelled = json.dumps(calls, ensure_ascii=False) if calls else None
    return "\n".join(part for part in (message["content"], spelled) if part)


def extra_keys(texts: Iterable[Text]) -> set[str]:
    """Those of MESSAGE_KEYS that the messages have."""
    messages = [each for text in texts if not isinstance(text, str) for each in text]
    return {key for each in messages if len(each) > len(_PLAIN) for key in each} - _PLAIN
