"""Prompts and answers as text or messages in, token ids that share their prompt out.

A prompt and its answer are tokenised as one conversation and cut where it leaves the prompt alone,
so that the tokens are those a stock model would see, and no border is re-tokenised. They depend on
no other answer of the prompt.
`Encoder` reads as a policy does; how reward models read stands in `reading`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cwpo_dist.config import TEMPLATE_DATE, ModelConfig
from cwpo_dist.lm.foreign import refused_as
from cwpo_dist.lm.ids import common_prefix, ids_of, without_eos
from cwpo_dist.lm.loading import ModelError, model_path
from cwpo_dist.lm.rows import Row
from cwpo_dist.lm.sharing import in_one_row
from cwpo_dist.lm.templates import ChatTemplate, Fault, Message, TokenError, Tools, attempted

__all__ = ["Asked", "Encoder", "Messages", "Row", "Text", "TokenError", "load_tokenizer"]

Messages = Sequence[Message]
Text = str | Messages
Texts = tuple[str, ...]  # of an answer, as they are tokenised


class Asked(NamedTuple):
    """A prompt, its answers, and the tools that the template is given beside them."""

    prompt: Text
    answers: Sequence[Text]
    tools: Tools = None


PAD_TOKEN = "<|pad|>"


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
    field = f"model_name_or_path: the tokenizer of {name!r} cannot be read"
    with refused_as(lambda why: ModelError(f"{field}: {why}")):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
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
    return tokenizer


class Encoder:
    """Turns a prompt and its answers into a `Row`, as a policy reads them.

    Each conversation is cut where its answer ends, and closed by one EOS.

    Attributes:
        tokenizer: with the chat template set, so that it travels with the saved model.
        eos_id: ends every answer, exactly once.
        bos_id: what the tokenizer puts in front of a text; None where it writes none. Under 'plain'
            it opens every prompt, once; any other template writes it, or nobody does.
        pad_id: fills batches behind the ends of rows.
        closing: how many of an answer's last tokens belong to no text of its own.
        token_types: whether the model is told prompt from answer by types (0 and 1).
        template: renders conversations.
    """

    closing = 1
    token_types = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str = "tokenizer",
        *,
        template_date: date = TEMPLATE_DATE,
        vocabulary: int | None = None,
    ):
        """Takes the tokenizer over.

        Args:
            tokenizer: from `load_tokenizer`.
            chat_template: 'tokenizer' (its own), 'plain' (text is prompt + answer, messages become
                an HH transcript), or the path of a Jinja file.
            template_date: what templates print that print today's date.
            vocabulary: how many embeddings the model has; None: one for each token.

        Raises:
            TokenError: when the tokenizer has no template, or the file does not exist.
        """
        eos = tokenizer.eos_token or tokenizer.sep_token
        if eos is None:
            raise TokenError("tokenizer: neither EOS nor SEP; set eos_token")
        self.tokenizer = tokenizer
        self.joins_text = chat_template == "plain"
        self.eos_token: str = eos
        self.eos_id = _id_of(tokenizer, eos)
        self.bos_id = _bos_id(tokenizer)
        self.vocabulary = vocabulary or len(tokenizer)
        self.pad_id = fill_id(tokenizer, self.vocabulary)
        self.template = self._template(chat_template, template_date)

    def _template(self, chat_template: str, on: date) -> ChatTemplate:
        """The template; it travels with the tokenizer, one of its own as it was."""
        template = ChatTemplate(self.tokenizer, chat_template, on)
        if self.joins_text and self.bos_id is not None:
            # Behind BOS some tokenizers put no space that they put at the start of a text: what
            # is read here is what the saved template writes, BOS and all.
            template.source = template.opened(
                str(self.tokenizer.convert_ids_to_tokens(self.bos_id))
            )
        self.tokenizer.chat_template = template.source
        return template

    def travel_as_text(self) -> None:
        """Tells that text is read, for a template that is saved for such."""

    def reads(self) -> str:
        """In words, for `plan`: up to which token an answer is read."""
        return f"reads the tokens of an answer up to EOS, {self.eos_token!r}"

    def encode(self, prompt: Text, answers: Sequence[Text], tools: Tools = None) -> Row:
        """One row: the tokens that all answers begin with, and each answer's own.

        Args:
            prompt: text, or a list of messages.
            answers: at least one, of the prompt's kind.
            tools: what the assistant may call; JSON schemas.

        Raises:
            TokenError: for a prompt without tokens, mixed kinds, or messages that the template
                refuses or leaves out.
        """
        (found,) = self.encode_all([Asked(prompt, answers, tools)])
        rows = []
        for row in found:
            if isinstance(row, TokenError):
                raise row
            rows.append(row)
        return in_one_row(rows)

    def encode_all(self, asked: Sequence[Asked]) -> list[list[Row | TokenError]]:
        """The rows of many answers, tokenised in one call that may use several cores.

        Args:
            asked: prompts with their answers and tools, as for `encode`.

        Returns:
            Of each prompt a row for each of its answers, with that one alone, or its error.
        """
        rendered = [self._rendered(each) for each in asked]
        texts = [text for of in rendered for text in of if not isinstance(text, TokenError)]
        rows = iter(self._rows(texts))
        return [
            [text if isinstance(text, TokenError) else next(rows) for text in of] for of in rendered
        ]

    def parted(self, row: Row, asked: Asked) -> Row:
        """The row of an answer as it is cut where it is too long: behind its prompt's tokens.

        Args:
            row: of the answer.
            asked: its prompt and tools.
        """
        return row

    def _rows(self, answers: Sequence[Texts]) -> list[Row | TokenError]:
        """The rows of rendered answers."""
        try:
            ids = self._ids(answers)
        except TokenError as error:
            if len(answers) == 1:
                return [error]
            return [row for each in answers for row in self._rows([each])]
        both = zip(answers, ids, strict=True)
        return [self._within(self._row(texts, found)) for texts, found in both]

    def left_out(self, prompt: Text, answer: Text, tools: Tools = None) -> set[str]:
        """The roles of a readable conversation with a message of which the template writes nothing.

        Args:
            prompt: as for `encode`.
            answer: one of its answers.
            tools: as for `encode`.
        """
        if self.joins_text and isinstance(prompt, str):
            return set()
        messages = [*_messages(prompt, "user"), *_messages(answer, "assistant")]
        text = self.template.render(messages, tools, opens=False)
        return {
            str(message["role"])
            for place, message in enumerate(messages)
            if self.template.leaves_out(messages, tools, text, [place])
        }

    def _rendered(self, asked: Asked) -> list[Texts | TokenError]:
        """Of each answer: the prompt as text, up to where it is asked for, and the conversation."""
        prompt, answers, tools = asked
        whole = [attempted(self._render, prompt, answer, tools) for answer in answers]
        opening = attempted(self._render, prompt, None, tools)
        return [self._both(opening, text) for text in whole]

    def _both(self, opening: str | TokenError, whole: str | TokenError) -> Texts | TokenError:
        if isinstance(whole, TokenError):
            return whole
        return (
            opening
            if isinstance(opening, TokenError)
            else (opening, without_eos(whole, self.eos_token))
        )

    def _render(self, prompt: Text, answer: Text | None, tools: Tools) -> str:
        """The conversation as text; without an answer, up to where one is asked for."""
        refuse_mixed(prompt, answer)
        if self.joins_text and isinstance(prompt, str):
            return prompt if answer is None else prompt + str(answer)
        before = _messages(prompt, "user")
        if answer is None:
            return self.template.render(before, tools, opens=True)
        messages = [*before, *_messages(answer, "assistant")]
        text = self.template.render(messages, tools, opens=False)
        for what, places in (
            ("prompt", range(len(before))),
            ("answer", range(len(before), len(messages))),
        ):
            if self.template.leaves_out(messages, tools, text, places):
                raise TokenError(
                    f"{what}: the chat template leaves nothing of its text; give one that writes "
                    "it (chat_template)",
                    Fault.LEFT_OUT,
                )
        return text

    def _ids(self, answers: Sequence[Texts]) -> list[list[list[int]]]:
        """The ids of each text of answers; of one that several have they are found once."""
        distinct = list(dict.fromkeys(chain.from_iterable(answers)))
        ids = dict(zip(distinct, self._tokens(distinct), strict=True))
        return [[ids[text] for text in texts] for texts in answers]

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of what a template wrote, as it wrote it; under 'plain' with the tokenizer's BOS."""
        found = ids_of(self.tokenizer, texts)
        return [self._with_bos(ids) for ids in found] if self.joins_text else found

    def _row(self, texts: Texts, ids: Sequence[list[int]]) -> Row | TokenError:
        """The tokens that the prompt alone shares with the conversation, and the answer's own."""
        opening, whole = ids
        shared = common_prefix(ids)
        if shared == 0:
            return TokenError(
                f"prompt: {texts[0][:40]!r} has no token of its own that could predict its "
                "answer; give a prompt, or a chat template that writes one",
                Fault.NO_TOKENS,
            )
        return Row(opening[:shared], ([*whole[shared:], self.eos_id],))

    def _within(self, row: Row | TokenError) -> Row | TokenError:
        """The row, unless the model has no embedding of one of its tokens."""
        if isinstance(row, TokenError):
            return row
        largest = max(map(max, filter(None, [row.prompt, *row.answers])))
        if largest < self.vocabulary:
            return row
        token = self.tokenizer.convert_ids_to_tokens(largest)
        return TokenError(
            f"prompt or answer: token {token!r} has id {largest}, but the model has "
            f"{self.vocabulary} embeddings; resize them to its tokenizer, or give the tokenizer "
            "that it was trained with",
            Fault.BEYOND,
        )

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]


def fill_id(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> int:
    """What fills a batch behind the ends of rows, where no token sees it.

    The pad token, or token 0 where the model has no embedding of that.
    """
    pad = tokenizer.pad_token_id
    return int(pad) if pad is not None and pad < vocabulary else 0


def _name_of(model: ModelConfig | str | Path) -> tuple[str, str | None]:
    if isinstance(model, ModelConfig):
        return model.model_name_or_path, model.revision
    return str(model), None


def _bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer itself puts in front of a text (BOS, or CLS), if any."""
    with_specials = tokenizer("x")["input_ids"]
    first = int(with_specials[0])
    return first if first in (tokenizer.bos_token_id, tokenizer.cls_token_id) else None


def _id_of(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(token_id, int)
    return token_id


def refuse_mixed(prompt: Text, answer: Text | None) -> None:
    """Returns when both are text, or both messages.

    Raises:
        TokenError: else.
    """
    if isinstance(prompt, str) != isinstance(prompt if answer is None else answer, str):
        raise TokenError(
            "prompt and answer: one is text, one a list of messages; use one kind", Fault.KINDS
        )


def _messages(text: Text, role: str) -> list[Message]:
    """Messages as they are, with every key; text becomes one of them."""
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)
