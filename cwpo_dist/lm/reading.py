"""A model's role, its configuration and its tokenizer in; the encoder that reads as it reads, out.

Pairs are read in three ways, and this is the one place that chooses:

- a policy reads prompt and answer, closed by one EOS (`tokens.Encoder`);
- a reward model that scores the last token reads its own rendering of the whole conversation,
  token for token what `apply_chat_template` gives (`RenderingEncoder`). An annotator of ours is
  one, whose template ends at the EOS where it is scored: so its folder says how it is read;
- any other classifier (BERT, DeBERTa) reads `tokenizer(question, answer)` (`PairEncoder`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from functools import cached_property
from itertools import takewhile
from typing import Literal

from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from cwpo_dist.config import TEMPLATE_DATE, ModelConfig
from cwpo_dist.lm.encoder import (
    Asked,
    Encoder,
    Text,
    load_tokenizer,
    refuse_mixed,
)
from cwpo_dist.lm.foreign import refused_as
from cwpo_dist.lm.ids import common_prefix, ids_of, unread, without_eos
from cwpo_dist.lm.loading import classifier_skeleton, load_config
from cwpo_dist.lm.modules import scores_last_token
from cwpo_dist.lm.rows import Row
from cwpo_dist.lm.templates import ChatTemplate, Fault, TokenError, Tools, words_of

Role = Literal["policy", "annotator", "reward model"]


def encoder_for(
    model: ModelConfig, role: Role, classifier: PreTrainedModel | None = None
) -> Encoder:
    """The encoder that turns pairs into what a model reads.

    Args:
        model: where its tokenizer and configuration are, its template and date.
        role: what it is: a policy, an annotator that `fit` trains, or a ready reward model.
        classifier: the reward model where it is loaded already.

    Raises:
        ModelError: when there is no tokenizer, or no such model.
        TokenError: when the chat template cannot be used.
    """
    tokenizer = load_tokenizer(model, distinct_pad=role == "annotator")
    text = load_config(model).get_text_config()
    words, pad = int(text.vocab_size), text.pad_token_id
    if role == "policy":
        return Encoder(
            tokenizer,
            model.chat_template,
            template_date=model.template_date,
            vocabulary=words,
        )
    if role == "annotator":  # as `load_annotator_base` will make it
        words, pad = max(words, len(tokenizer)), tokenizer.pad_token_id
    kind: type[RenderingEncoder] | type[PairEncoder] = RenderingEncoder
    if not scores_last_token(classifier or classifier_skeleton(model)):
        kind = PairEncoder
    return kind(
        tokenizer,
        model.chat_template,
        template_date=model.template_date,
        vocabulary=words,
        pad=pad,
        trained=role == "annotator",
    )


class RenderingEncoder(Encoder):
    """Turns a prompt and its answers into a `Row`, as a last-token reward model reads them.

    That is the rendering of the whole conversation, up to the token that a stock classifier pools:
    the last one that is not its configuration's pad token. Text counts as a user's message and an
    assistant's. Under 'plain', and for annotators of ours, it stands between one BOS (where the
    tokenizer writes one) and one EOS, as TRL's RewardTrainer ends text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str = "tokenizer",
        *,
        pad: int | None,
        trained: bool = False,
        template_date: date = TEMPLATE_DATE,
        vocabulary: int | None = None,
    ):
        """Takes the tokenizer over.

        Args:
            tokenizer: from `load_tokenizer`.
            chat_template: as for `Encoder`.
            pad: the configuration's pad token, which the classifier passes over.
            trained: the model is one that we train: its template travels with it.
            template_date: as for `Encoder`.
            vocabulary: as for `Encoder`.

        Raises:
            TokenError: as `Encoder`.
        """
        self._pad, self._trained = pad, trained
        super().__init__(
            tokenizer, chat_template, template_date=template_date, vocabulary=vocabulary
        )
        self.closing = self._closing()

    def _template(self, chat_template: str, on: date) -> ChatTemplate:
        self._ends = self._trained or chat_template == "plain"
        bos = "" if self.bos_id is None else str(self.tokenizer.convert_ids_to_tokens(self.bos_id))
        self._bos = bos
        ends = (bos, self.eos_token) if self._ends else None
        template = ChatTemplate(self.tokenizer, chat_template, on, ends)
        if self._trained:
            self.tokenizer.chat_template = template.finished
        return template

    def travel_as_text(self) -> None:
        """The model is trained on text: under 'plain' its saved template joins two messages."""
        if self._trained and self.joins_text:
            self.tokenizer.chat_template = self.template.joined

    def _closing(self) -> int:
        """How many tokens the template writes behind an answer, up to the one that is read."""
        one, other = (self._read(ids) for ids in self._probed)
        pairs = zip(reversed(one), reversed(other), strict=False)
        return len(list(takewhile(lambda both: both[0] == both[1], pairs)))

    @cached_property
    def _probed(self) -> list[list[int]]:
        """Two conversations, whose answers end in different letters."""
        asked = [{"role": "user", "content": "Q"}]
        answers = [[{"role": "assistant", "content": text}] for text in ("x1", "y2")]
        texts = self._rendered(Asked(asked, answers))
        if isinstance(texts, TokenError):  # it demands more of a conversation
            return [[self.eos_id], [self.eos_id]]
        return self._tokens(texts)

    def reads(self) -> str:
        """In words, for `plan`: which token is read."""
        rendered = self._probed[0]
        read = self._read(rendered)
        *before, last = read[-max(self.closing, 1) :]
        shown = repr(self.tokenizer.decode([last])) if self.closing else "the answer's own"
        after = f" after {self.tokenizer.decode(before)!r}" if before else ""
        passed = self.tokenizer.decode(rendered[len(read) :])
        over = f"; transformers passes over {passed!r} behind it, the pad token" if passed else ""
        return f"reads the last token of its own rendering: {shown}{after}{over}"

    def _rendered(self, pair: Asked) -> list[str] | TokenError:
        prompt, answers, tools = pair
        try:
            texts = [self._render(prompt, answer, tools) for answer in answers]
        except TokenError as error:
            return error
        if not (self.joins_text and isinstance(prompt, str)):
            return texts
        ended = [without_eos(text, self.eos_token) + self.eos_token for text in texts]
        return [text if text.startswith(self._bos) else self._bos + text for text in ended]

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return ids_of(self.tokenizer, texts)

    def _read(self, ids: list[int]) -> list[int]:
        """Up to the token that is read: no later one changes what stands there."""
        end = len(ids)
        while end and ids[end - 1] == self._pad:
            end -= 1
        return ids[:end]

    def _row(self, texts: Sequence[str], ids: list[list[int]]) -> Row | TokenError:
        read = [self._read(each) for each in ids]
        shared = min(common_prefix(read), min(map(len, read)) - 1)
        if shared < 1:
            return TokenError(
                f"prompt: {texts[0][:40]!r} begins with no token that its answers share; give a "
                "prompt, or a chat template that writes one",
                Fault.NO_TOKENS,
            )
        return Row(read[0][:shared], tuple(each[shared:] for each in read))


class PairEncoder(Encoder):
    """Turns a question and its answers into a `Row`, as a classifier of pairs of texts reads them.

    That is `tokenizer(question, answer)`, with its special tokens. The question of a conversation
    is its one user message; of a longer one, the prompt that the chat template writes, or without a
    template its messages, a blank line between them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str = "tokenizer",
        *,
        pad: int | None,
        trained: bool = False,
        template_date: date = TEMPLATE_DATE,
        vocabulary: int | None = None,
    ):
        """Takes the tokenizer over.

        Args:
            tokenizer: from `load_tokenizer`.
            chat_template: for prompts of several messages; 'tokenizer' also where it has none.
            pad: the configuration's pad token, from which some models count positions.
            trained: the model is one that we train; its tokenizer travels as it is.
            template_date: as for `Encoder`.
            vocabulary: as for `Encoder`.

        Raises:
            TokenError: as `Encoder`; also for a tokenizer that puts the texts in another order.
        """
        self._has_template = chat_template != "tokenizer" or bool(tokenizer.chat_template)
        super().__init__(
            tokenizer, chat_template, template_date=template_date, vocabulary=vocabulary
        )
        if pad is not None and pad >= 0:
            self.pad_id = int(pad)
        self.token_types = self._types()

    def _template(self, chat_template: str, on: date) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, chat_template if self._has_template else "plain", on)

    def _types(self) -> bool:
        encoded = self.tokenizer(["a"], ["b"])
        border = _border(encoded, 0)
        types = encoded.get("token_type_ids", [None])[0]
        if border is not None and (types is None or not any(types)):
            return False
        if border is None or types != [0] * border + [1] * (len(types) - border):
            raise TokenError(
                f"tokenizer: {type(self.tokenizer).__name__} gives a pair of texts the types "
                f"{types}; give a reward model whose tokenizer marks them by 0 and 1, or a fast one"
            )
        return True

    def reads(self) -> str:
        """In words, for `plan`: which token is read."""
        shown = self.tokenizer.decode(self.tokenizer("question", "answer")["input_ids"])
        several = "as its template writes them" if self._has_template else "joined by blank lines"
        return (
            f"reads tokenizer(question, answer) as a whole: {shown!r}; of prompts of several "
            f"messages the question is all of them, {several}"
        )

    def left_out(self, prompt: Text, answer: Text, tools: Tools = None) -> set[str]:
        """None where no template is used."""
        if not self._by_template(prompt):
            return set()
        return super().left_out(prompt, answer, tools)

    def _rendered(self, pair: Asked) -> list[str] | TokenError:
        """The question and an answer, for each answer."""
        prompt, answers, tools = pair
        try:
            for answer in answers:
                refuse_mixed(prompt, answer)
            question = self._question(prompt, tools)
        except TokenError as error:
            return error
        return [text for answer in answers for text in (question, _words(answer))]

    def _question(self, prompt: Text, tools: Tools) -> str:
        if isinstance(prompt, str) or not self._by_template(prompt):
            return _words(prompt)
        return self.template.render(prompt, tools, opens=True)

    def _by_template(self, prompt: Text) -> bool:
        """Whether the question is what the template writes: there is one, and several messages."""
        if isinstance(prompt, str) or not self._has_template:
            return False
        return [message["role"] for message in prompt] != ["user"]

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids up to where each pair's second text begins, and from there; none without one."""
        if not texts:
            return []
        with refused_as(unread):
            found = self.tokenizer(list(texts[::2]), list(texts[1::2]), verbose=False)
            whole = [(ids, _border(found, place)) for place, ids in enumerate(found["input_ids"])]
        return [part for ids, border in whole for part in _parted(ids, border)]

    def _row(self, texts: Sequence[str], ids: list[list[int]]) -> Row | TokenError:
        for question, answer, own in zip(texts[::2], texts[1::2], ids[1::2], strict=True):
            if not own:
                return TokenError(
                    f"answer: the tokenizer makes nothing of {answer[:40]!r} (to "
                    f"{question[:40]!r}); give answers with text",
                    Fault.NO_TOKENS,
                )
        return Row(ids[0], tuple(ids[1::2]))


def _border(encoded: BatchEncoding, place: int) -> int | None:
    """Where the second text of a pair begins; None where it has no token."""
    if encoded.is_fast:
        of: Sequence[int | None] = encoded.sequence_ids(place)
    else:
        of = encoded.get("token_type_ids", [[]] * (place + 1))[place]
    return of.index(1) if 1 in of else None


def _parted(ids: list[int], border: int | None) -> tuple[list[int], list[int]]:
    return (ids, []) if border is None else (ids[:border], ids[border:])


def _words(text: Text) -> str:
    """Text, or that of messages, a blank line between them."""
    if isinstance(text, str):
        return text
    return "\n\n".join(filter(None, map(words_of, text)))
