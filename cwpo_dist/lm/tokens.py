"""Prompts and answers as text or messages in, token ids that share their prompt out.

A prompt and its answer are tokenised as one conversation and cut where all answers of the prompt
still agree, so that the tokens are those a stock model would see, and no border is re-tokenised.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.loading import ModelError, model_path
from cwpo_dist.lm.rows import Row

__all__ = [
    "Asked",
    "Encoder",
    "Messages",
    "Row",
    "Text",
    "TokenError",
    "fit_length",
    "load_tokenizer",
]

Messages = Sequence[dict[str, Any]]
Text = str | Messages
Tools = list[Any] | None  # objects, as transformers takes them


class Asked(NamedTuple):
    """A prompt, its answers, and the tools that the template is given beside them."""

    prompt: Text
    answers: Sequence[Text]
    tools: Tools = None


PAD_TOKEN = "<|pad|>"
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
_SHORTEST_MAX_LENGTH = 4  # BOS, a prompt token, an answer token, EOS


class TokenError(ValueError):
    """Text that cannot become tokens; the message names the field and the remedy."""


def load_tokenizer(
    model: ModelConfig | str | Path, *, distinct_pad: bool = False
) -> PreTrainedTokenizerBase:
    """A model's tokenizer, with a pad token.

    Args:
        model: a model's configuration, folder, URI or hub id.
        distinct_pad: for annotators; adds `<|pad|>` where the tokenizer has no pad token or pads
            with EOS, as Hugging Face pools the last token that is no pad and would skip EOS.
            Otherwise a missing pad token becomes EOS, as usual for language models.

    Raises:
        ModelError: when there is no tokenizer, or it has no token that ends a text.
    """
    name, revision = _name_of(model)
    path = model_path(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"model_name_or_path: no tokenizer in {name!r}: {error}") from error
    eos = tokenizer.eos_token or tokenizer.sep_token
    if eos is None:
        raise ModelError(
            f"model_name_or_path: the tokenizer of {name!r} has neither EOS nor SEP; set eos_token "
            "in its tokenizer_config.json"
        )
    if distinct_pad and tokenizer.pad_token in (None, eos):
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = eos
    tokenizer.padding_side = "right"
    return tokenizer


class Encoder:
    """Turns a prompt and its answers into a `Row`.

    Attributes:
        tokenizer: with the chat template set, so that it travels with the saved model.
        eos_id: ends every answer, exactly once.
        bos_id: opens every prompt, exactly once; None where the tokenizer writes none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str = "tokenizer"):
        """Takes the tokenizer over.

        Args:
            tokenizer: from `load_tokenizer`.
            chat_template: 'tokenizer' (its own), 'plain' (text is prompt + answer, messages become
                an HH transcript), or the path of a Jinja file.

        Raises:
            TokenError: when the tokenizer has no template, or the file does not exist.
        """
        eos = tokenizer.eos_token or tokenizer.sep_token
        if eos is None:
            raise TokenError("tokenizer: neither EOS nor SEP; set eos_token")
        tokenizer.chat_template = _template(tokenizer, chat_template)
        self.tokenizer = tokenizer
        self.joins_text = chat_template == "plain"
        self.eos_token: str = eos
        self.eos_id = _id_of(tokenizer, eos)
        self.bos_id = _bos_id(tokenizer)

    def encode(self, prompt: Text, answers: Sequence[Text], tools: Tools = None) -> Row:
        """One row: the tokens all answers share, and each answer's own.

        Args:
            prompt: text, or a list of messages: role, content, and what else templates read.
            answers: one or two, of the prompt's kind.
            tools: what the template is given beside the messages.

        Raises:
            TokenError: for a prompt without tokens, mixed kinds, or messages that the template
                refuses.
        """
        (row,) = self.encode_all([Asked(prompt, answers, tools)])
        if isinstance(row, TokenError):
            raise row
        return row

    def encode_all(self, pairs: Sequence[Asked]) -> list[Row | TokenError]:
        """The rows of many pairs, tokenised in one call that may use several cores.

        Args:
            pairs: prompt, answers and tools of each, as for `encode`.

        Returns:
            A row for each pair, or the error that `encode` would raise.
        """
        rendered = [self._rendered(pair) for pair in pairs]
        texts = [text for each in rendered if not isinstance(each, TokenError) for text in each]
        ids = iter(self._tokens(texts))
        found: list[Row | TokenError] = []
        for each in rendered:
            if isinstance(each, TokenError):
                found.append(each)
            else:
                found.append(_row(each, [next(ids) for _ in each], self.eos_id))
        return found

    def _rendered(self, pair: Asked) -> list[str] | TokenError:
        """The prompt as text, up to where an answer is asked for, and each conversation."""
        prompt, answers, tools = pair
        try:
            whole = [self._without_eos(self._render(prompt, each, tools)) for each in answers]
            return [self._render(prompt, None, tools), *whole]
        except TokenError as error:
            return error

    def _render(self, prompt: Text, answer: Text | None, tools: Tools = None) -> str:
        """The conversation as text; without an answer, up to where one is asked for."""
        if isinstance(prompt, str) != isinstance(prompt if answer is None else answer, str):
            raise TokenError("prompt and answer: one is text, one a list of messages; use one kind")
        if self.joins_text and isinstance(prompt, str):
            return prompt if answer is None else prompt + str(answer)
        reply = [] if answer is None else _messages(answer, "assistant")
        messages = [*_messages(prompt, "user"), *reply]
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=answer is None
            )
        except (TemplateError, TypeError, ValueError) as error:  # it may add text to a null
            roles = ", ".join(message["role"] for message in messages)
            raise TokenError(f"prompt: the chat template refused roles {roles}: {error}") from error
        return str(rendered)

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids with one BOS in front, where the tokenizer uses one, and no EOS at the end."""
        if not texts:
            return []
        encoded: list[list[int]] = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return [self._with_bos(ids) for ids in encoded]

    def _without_eos(self, text: str) -> str:
        """Drops EOS, and what a template writes after it, from the end."""
        while (stripped := text.rstrip()).endswith(self.eos_token):
            text = stripped.removesuffix(self.eos_token)
        return text

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]


def _row(texts: list[str], ids: list[list[int]], eos_id: int) -> Row | TokenError:
    """The tokens that all sequences of a pair share, and each answer's own."""
    opening_ids, *full_ids = ids
    shared = _common_prefix([opening_ids, *full_ids])
    if shared == 0:
        return TokenError(
            f"prompt: {texts[0][:40]!r} has no token of its own that could predict its answer; "
            "give a prompt, or a chat template that writes one"
        )
    return Row(
        prompt=full_ids[0][:shared],
        answers=tuple([*ids[shared:], eos_id] for ids in full_ids),
    )


def fit_length(
    row: Row,
    max_length: int,
    over_length: Literal["drop", "truncate"],
    *,
    bos_id: int | None = None,
) -> Row | None:
    """The row when prompt and longest answer fit `max_length`; else dropped or truncated.

    Truncation takes the prompt's oldest tokens first (its BOS stays), down to a quarter of
    `max_length`, as an answer without its question teaches nothing; then it takes the answers'
    last tokens, and EOS stays. A pair whose answers differ only in what was cut off is dropped.

    Args:
        row: any row.
        max_length: tokens of prompt + longest answer.
        over_length: 'drop' or 'truncate'.
        bos_id: the encoder's, kept in front of a cut prompt.

    Returns:
        A row of at most `max_length` tokens an answer, or None: to be counted as over length.

    Raises:
        TokenError: for a `max_length` that leaves no room to truncate to.
    """
    if row.n_longest <= max_length:
        return row
    if over_length == "drop":
        return None
    if max_length < _SHORTEST_MAX_LENGTH:
        raise TokenError(
            f"max_length: {max_length} leaves no room for prompt and answer; use at least "
            f"{_SHORTEST_MAX_LENGTH}"
        )
    longest = max(len(answer) for answer in row.answers)
    room = max(max_length - longest, max_length // 4, 2)
    prompt = _cut_left(row.prompt, room, bos_id)
    answers = tuple(_cut_right(answer, max_length - len(prompt)) for answer in row.answers)
    if len(answers) > 1 and all(answer == answers[0] for answer in answers):
        return None
    return Row(prompt, answers)


def _name_of(model: ModelConfig | str | Path) -> tuple[str, str | None]:
    if isinstance(model, ModelConfig):
        return model.model_name_or_path, model.revision
    return str(model), None


def _template(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> str:
    if chat_template == "plain":
        return PLAIN_TEMPLATE
    if chat_template == "tokenizer":
        own = tokenizer.chat_template
        if not isinstance(own, str):
            raise TokenError(
                "chat_template: 'tokenizer', but this tokenizer has none of its own; use 'plain' "
                "or the path of a Jinja file"
            )
        return own
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except OSError as error:
        raise TokenError(
            f"chat_template: cannot read {chat_template!r} ({error.strerror}); use 'tokenizer', "
            "'plain' or the path of a Jinja file"
        ) from None


def _bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer itself puts in front of a text (BOS, or CLS), if any."""
    with_specials = tokenizer("x")["input_ids"]
    first = int(with_specials[0])
    return first if first in (tokenizer.bos_token_id, tokenizer.cls_token_id) else None


def _id_of(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(token_id, int)
    return token_id


def _messages(text: Text, role: str) -> list[dict[str, Any]]:
    """Messages with all their keys, for a template may read any of them."""
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)


def _common_prefix(sequences: Sequence[list[int]]) -> int:
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


def _cut_left(prompt: list[int], room: int, bos_id: int | None) -> list[int]:
    if len(prompt) <= room:
        return prompt
    if prompt[0] == bos_id:
        return [prompt[0], *prompt[len(prompt) - room + 1 :]]
    return prompt[len(prompt) - room :]


def _cut_right(answer: list[int], room: int) -> list[int]:
    return answer if len(answer) <= room else [*answer[: room - 1], answer[-1]]
