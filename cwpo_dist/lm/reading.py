"""A model's role, its configuration and its tokenizer in; the encoder that reads as it reads, out.

Answers are read in three ways, and this is the one place that chooses:

- a policy reads prompt and answer, closed by one EOS (`encoder.Encoder`);
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
    Texts,
    load_tokenizer,
    refuse_mixed,
)
from cwpo_dist.lm.foreign import refused_as
from cwpo_dist.lm.ids import common_prefix, ids_of, unread, without_eos
from cwpo_dist.lm.loading import classifier_skeleton, load_config
from cwpo_dist.lm.modules import scores_last_token
from cwpo_dist.lm.rows import Row
from cwpo_dist.lm.templates import ChatTemplate, Fault, TokenError, Tools, attempted, words_of

Role = Literal["policy", "annotator", "reward model"]


def encoder_for(
    model: ModelConfig, role: Role, classifier: PreTrainedModel | None = None
) -> Encoder:
    """The encoder that turns prompts and answers into what a model reads.

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
        self.pad_id = _filling(pad, self.pad_id)
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
        rendered = [text[0] for text in texts if not isinstance(text, TokenError)]
        if len(rendered) < len(answers):  # it demands more of a conversation
            return [[self.eos_id], [self.eos_id]]
        return self._tokens(rendered)

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

    def _rendered(self, asked: Asked) -> list[Texts | TokenError]:
        prompt, answers, tools = asked
        texts = [attempted(self._whole, prompt, answer, tools) for answer in answers]
        return [text if isinstance(text, TokenError) else (text,) for text in texts]

    def _whole(self, prompt: Text, answer: Text | None, tools: Tools) -> str:
        """The conversation, or the prompt up to where an answer is asked for, as text."""
        text = self._render(prompt, answer, tools)
        if not (self.joins_text and isinstance(prompt, str)):
            return text
        end = "" if answer is None else self.eos_token
        ended = without_eos(text, self.eos_token) + end
        return ended if ended.startswith(self._bos) else self._bos + ended

    def parted(self, row: Row, asked: Asked) -> Row:
        """The row cut where it leaves what is rendered of the prompt alone.

        A score needs no such border, but what is too long is cut on both its sides.
        """
        opening = attempted(self._whole, asked.prompt, None, asked.tools)
        if isinstance(opening, TokenError):
            return row
        whole = [*row.prompt, *row.answers[0]]
        shared = common_prefix([whole[:-1], *self._tokens([opening])])
        return Row(whole[:shared], (whole[shared:],)) if shared else row

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return ids_of(self.tokenizer, texts)

    def _read(self, ids: list[int]) -> list[int]:
        """Up to the token that is read: no later one changes what stands there."""
        end = len(ids)
        while end and ids[end - 1] == self._pad:
            end -= 1
        return ids[:end]

    def _row(self, texts: Texts, ids: Sequence[list[int]]) -> Row | TokenError:
        """The token that is read as the answer's own, and all before it."""
        read = self._read(ids[0])
        if len(read) < 2:
            return TokenError(
                f"prompt: of {texts[0][:40]!r} there is no token before the one that is read; give "
                "a prompt, or a chat template that writes one",
                Fault.NO_TOKENS,
            )
        return Row(read[:-1], (read[-1:],))


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
        self.pad_id = _filling(pad, self.pad_id)
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

    def _rendered(self, asked: Asked) -> list[Texts | TokenError]:
        """Of each answer: the question, and it."""
        prompt, answers, tools = asked
        question = attempted(self._question, prompt, tools)
        return [self._asked(prompt, question, answer) for answer in answers]

    def _asked(self, prompt: Text, question: str | TokenError, answer: Text) -> Texts | TokenError:
        try:
            refuse_mixed(prompt, answer)
        except TokenError as error:
            return error
        return question if isinstance(question, TokenError) else (question, _words(answer))

    def _question(self, prompt: Text, tools: Tools) -> str:
        if isinstance(prompt, str) or not self._by_template(prompt):
            return _words(prompt)
        return self.template.render(prompt, tools, opens=True)

    def _by_template(self, prompt: Text) -> bool:
        """Whether the question is what the template writes: there is one, and several messages."""
        if isinstance(prompt, str) or not self._has_template:
            return False
        return [message["role"] for message in prompt] != ["user"]

    def _ids(self, answers: Sequence[Texts]) -> list[list[list[int]]]:
        """The ids up to where each second text begins, and from there; none without one."""
        if not answers:
            return []
        first, second = (list(texts) for texts in zip(*answers, strict=True))
        with refused_as(unread):
            found = self.tokenizer(first, second, verbose=False)
            whole = [(ids, _border(found, place)) for place, ids in enumerate(found["input_ids"])]
        return [_parted(ids, border) for ids, border in whole]

    def _row(self, texts: Texts, ids: Sequence[list[int]]) -> Row | TokenError:
        (question, answer), (before, own) = texts, ids
        if not own:
            return TokenError(
                f"answer: the tokenizer makes nothing of {answer[:40]!r} (to {question[:40]!r}); "
                "give answers with text",
                Fault.NO_TOKENS,
            )
        return Row(before, (own,))


def _filling(pad: int | None, own: int) -> int:
    """What fills rows up: what the classifier knows as a pad, whatever its tokenizer's own is."""
    return own if pad is None or pad < 0 else int(pad)


def _border(encoded: BatchEncoding, place: int) -> int | None:
    """Where the second text of a pair begins; None where it has no token."""
    if encoded.is_fast:
        of: Sequence[int | None] = encoded.sequence_ids(place)
    else:
        of = encoded.get("token_type_ids", [[]] * (place + 1))[place]
    return of.index(1) if 1 in of else None


def _parted(ids: list[int], border: int | None) -> list[list[int]]:
    return [ids, []] if border is None else [ids[:border], ids[border:]]


def _words(text: Text) -> str:
    """Text, or that of messages, a blank line between them."""
    if isinstance(text, str):
        return text
    return "\n\n".join(filter(None, map(words_of, text)))
