"""A tokenizer and the user's choice of chat template in; conversations as text out.

A template is rendered by transformers, with all that a message carries. What is done to it before
is done to its text, so that it can travel with a saved tokenizer: the date that it prints is
pinned, and for an annotator of ours it ends where it is scored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from enum import StrEnum
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ParamSpec

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

P = ParamSpec("P")
Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]] | None

# Anthropic's HH transcripts. Text under 'plain' is prompt + answer, and never meets it.
PLAIN_TEMPLATE = (
    "{% if tools %}{{ '\n\nTools: ' }}{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\n\nHuman: ' }}"
    "{% elif message['role'] == 'assistant' %}{{ '\n\nAssistant: ' }}"
    "{% else %}{{ '\n\n' + message['role'] | capitalize + ': ' }}{% endif %}"
    "{{ message['content'] or '' }}"
    "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
# Text under 'plain' as a template, for a saved tokenizer: a prompt and its answer as two messages.
JOINED_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

# A template is a program of somebody else's: these are what its operations raise, and those of the
# Python below it (a macro that calls itself, a text of a terabyte).
_REFUSALS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    MemoryError,
)
_DIRECTIVES = "aAwdbBmyYHIpMSfzZjUWcxXGuVeDFTR"  # of strftime
_MARKS = {"user": "Wq7mark1", "assistant": "Wq7mark2", "system": "Wq7mark3"}
_TELLING = 12  # letters of a text that no template has by chance
_OTHER_DATE = date(1987, 11, 3)

_PINNED = """\
{{%- macro strftime_now(format) -%}}{{{{- format{replaced} -}}}}{{%- endmacro -%}}
{{%- set date_string = {date_string} %}}
"""
_ENDED = """\
{{%- set cwpo_bos, cwpo_eos = {bos}, {eos} -%}}
{{%- set cwpo_text %}}
{template}{{%+ endset -%}}
{{%- set cwpo = namespace(text=cwpo_text) -%}}
{{%- if not add_generation_prompt -%}}
{{%- for _ in cwpo_text.split(cwpo_eos) -%}}
{{%- if cwpo.text.rstrip().endswith(cwpo_eos) -%}}
{{%- set cwpo.text = cwpo.text.rstrip()[:-(cwpo_eos | length)] -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- set cwpo.text = cwpo.text ~ cwpo_eos -%}}
{{%- endif -%}}
{{{{- ('' if cwpo.text.startswith(cwpo_bos) else cwpo_bos) ~ cwpo.text -}}}}
"""


class Fault(StrEnum):
    """Why a model cannot read a pair: the reasons that stand in `rejects/` and in manifests."""

    REFUSED = "refused by the chat template"
    UNREAD = "refused by the tokenizer"
    LEFT_OUT = "left out by the chat template"
    IDENTICAL = "the same tokens for both answers"
    NO_TOKENS = "no tokens of its own"
    BEYOND = "tokens beyond the embeddings"
    KINDS = "text beside messages"
    OVER_LENGTH = "over_length"


class TokenError(ValueError):
    """Text that cannot become tokens; the message names the field and the remedy.

    Attributes:
        fault: which kind of reason it is; None for what is wrong with the whole model.
    """

    def __init__(self, message: str, fault: Fault | None = None) -> None:
        super().__init__(message)
        self.fault = fault


def attempted(render: Callable[P, str], *args: P.args, **kwargs: P.kwargs) -> str | TokenError:
    """What it gives, or its refusal."""
    try:
        return render(*args, **kwargs)
    except TokenError as error:
        return error


class ChatTemplate:
    """Renders conversations as a tokenizer's template does, on a date that does not change.

    Attributes:
        source: the template as it was given; of a tokenizer that has several all, by name.
        parts: roles whose text is handed over as a list of parts, as the template reads no other.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        choice: str,
        on: date,
        ends: tuple[str, str] | None = None,
    ) -> None:
        """Reads the template and tries it out.

        Args:
            tokenizer: which renders, and may have templates of its own.
            choice: 'tokenizer' (its own; of several the one that transformers takes), 'plain'
                (HH transcripts), or the path of a Jinja file.
            on: the date for templates that print today's.
            ends: BOS (or nothing) and EOS between which every rendering shall stand; None: it
                stays as it is.

        Raises:
            TokenError: when there is no such template, or it is no Jinja.
        """
        self._tokenizer, self._on, self._ends = tokenizer, on, ends
        self.source = _source(tokenizer, choice)
        self.parts: frozenset[str] = frozenset()
        try:
            self.parts = self._roles_by_parts()
        except TemplateSyntaxError as error:
            raise TokenError(f"chat_template: {choice!r}: line {error.lineno}: {error}") from error

    @property
    def finished(self) -> str | dict[str, str]:
        """The template, or all of them by name, with what is done to it, for a saved tokenizer."""
        if isinstance(self.source, str):
            return self._finished(self.source, self._on)
        return {name: self._finished(text, self._on) for name, text in self.source.items()}

    def opened(self, bos: str) -> str:
        """The one of 'plain', for a saved tokenizer, with BOS in front of what it writes."""
        assert isinstance(self.source, str)
        return "{{- " + _quoted(bos) + " }}" + self.source

    @property
    def joined(self) -> str:
        """For a saved tokenizer, what reads two messages as text is read under 'plain'."""
        return self._finished(JOINED_TEMPLATE, self._on)

    def render(self, messages: Sequence[Message], tools: Tools = None, *, opens: bool) -> str:
        """The conversation as text.

        Args:
            messages: with whatever keys they have.
            tools: JSON schemas of functions; a template named `tool_use` is taken for them.
            opens: up to where an answer is asked for.

        Raises:
            TokenError: when the template refuses them.
        """
        try:
            return self._rendered(messages, tools, opens, self._on)
        except _REFUSALS as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise TokenError(
                f"prompt: the chat template refused roles {roles}: {error}; give a template that "
                "takes them (chat_template)",
                Fault.REFUSED,
            ) from error

    def leaves_out(
        self, messages: Sequence[Message], tools: Tools, text: str, of: Sequence[int]
    ) -> bool:
        """Whether nothing of some messages' words stands in the rendering of them all.

        Args:
            messages: the conversation.
            tools: as in `render`.
            text: its rendering.
            of: the places of the messages in question.
        """
        words = [words_of(messages[place]).strip() for place in of]
        if not any(words) or any(len(word) > _TELLING and word in text for word in words):
            return False
        silent = [
            {**message, "content": _silent(message.get("content"))} if place in of else message
            for place, message in enumerate(messages)
        ]
        try:
            return self._rendered(silent, tools, False, self._on) == text
        except _REFUSALS:  # it tells an empty message from a full one
            return False

    @cached_property
    def prints_date(self) -> bool:
        """Whether what it writes depends on the date that it is given."""
        messages = _probe("user", "assistant")
        try:
            now, then = (self._rendered(messages, None, True, d) for d in (self._on, _OTHER_DATE))
        except _REFUSALS:
            return False
        return now != then

    def _rendered(self, messages: Sequence[Message], tools: Tools, opens: bool, on: date) -> str:
        handed = [self._handed(message) for message in messages]
        rendered = self._tokenizer.apply_chat_template(
            handed,
            tools=None if tools is None else [dict(tool) for tool in tools],
            chat_template=self._finished(self._chosen(tools), on),
            add_generation_prompt=opens,
            tokenize=False,
        )
        return str(rendered)

    def _handed(self, message: Message) -> dict[str, Any]:
        """The message as the template reads it."""
        content = message.get("content")
        if message["role"] in self.parts and isinstance(content, str):
            return {**message, "content": [{"type": "text", "text": content}]}
        return dict(message)

    def _chosen(self, tools: Tools) -> str:
        if isinstance(self.source, str):
            return self.source
        named = "tool_use" if tools is not None and "tool_use" in self.source else "default"
        return self.source[named]

    def _finished(self, template: str, on: date) -> str:
        template = _pinned(template, on)
        return template if self._ends is None else _ended(template, *self._ends)

    def _roles_by_parts(self) -> frozenset[str]:
        """Roles whose text it drops (or refuses) as a string, and writes as a list of parts."""
        found: tuple[str, ...] = ()
        for tried in ((), ("user",), ("assistant",), ("user", "assistant")):
            if self._shows(("user", "assistant"), tried):
                found = tried
                break
        with_system = ("system", "user", "assistant")
        if not self._shows(with_system, found) and self._shows(with_system, (*found, "system")):
            found = (*found, "system")
        return frozenset(found)

    def _shows(self, roles: tuple[str, ...], parts: tuple[str, ...]) -> bool:
        self.parts = frozenset(parts)
        try:
            text = self._rendered(_probe(*roles), None, False, self._on)
        except TemplateSyntaxError:
            raise
        except _REFUSALS:
            return False
        return all(_MARKS[role] in text for role in roles)


def words_of(message: Message) -> str:
    """The text of a message, also of one in parts; empty for one that only calls tools."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(str(part.get("text") or "") for part in content)


def _silent(content: str | Sequence[Message] | None) -> str | list[Message]:
    """The content without its words."""
    if content is None or isinstance(content, str):
        return ""
    return [{**part, "text": ""} if "text" in part else part for part in content]


def _probe(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": _MARKS[role]} for role in roles]


def _source(tokenizer: PreTrainedTokenizerBase, choice: str) -> str | dict[str, str]:
    """The template's text, or those of a tokenizer that has several, by name."""
    if choice == "plain":
        return PLAIN_TEMPLATE
    if choice == "tokenizer":
        return _own(tokenizer)
    try:
        return Path(choice).read_text(encoding="utf-8")
    except OSError as error:
        raise TokenError(
            f"chat_template: cannot read {choice!r} ({error.strerror}); use 'tokenizer', 'plain' "
            "or the path of a Jinja file"
        ) from None


def _own(tokenizer: PreTrainedTokenizerBase) -> str | dict[str, str]:
    own = tokenizer.chat_template
    if not own:
        raise TokenError(
            "chat_template: 'tokenizer', but this tokenizer has none of its own; use 'plain' or "
            "the path of a Jinja file"
        )
    if isinstance(own, dict) and "default" not in own:
        raise TokenError(
            f"chat_template: 'tokenizer', but of its templates ({', '.join(sorted(own))}) none is "
            "named 'default'; save the one to be used as a Jinja file and give its path"
        )
    return dict(own) if isinstance(own, dict) else str(own)


@lru_cache(maxsize=64)
def _pinned(template: str, on: date) -> str:
    """The template with a clock that stands still, by either way to ask for the date."""
    if "strftime_now" not in template and "date_string" not in template:
        return template
    directives = [f"%{flag}{letter}" for letter in _DIRECTIVES for flag in ("-", "")]
    known = {each: on.strftime(each) for each in directives} | {"%%": "%"}
    replaced = "".join(f" | replace({_quoted(k)}, {_quoted(v)})" for k, v in known.items())
    start = _PINNED.format(replaced=replaced, date_string=_quoted(on.strftime("%d %b %Y")))
    return start + template


@lru_cache(maxsize=64)
def _ended(template: str, bos: str, eos: str) -> str:
    """The template between one BOS and one EOS, without what it writes behind its own EOS."""
    for newline in ("\r\n", "\n", "\r"):  # Jinja drops one at the end, which is then no end
        if template.endswith(newline):
            template = template.removesuffix(newline)
            break
    return _ENDED.format(template=template, bos=_quoted(bos), eos=_quoted(eos))


def _quoted(text: str) -> str:
    """A string as Jinja reads it."""
    return json.dumps(text, ensure_ascii=False)
