"""Sampled pairs in; what a model makes of them, in numbers and as it reads them, out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.encoder import Asked, Encoder
from cwpo_dist.lm.fitting import encode_answers, encode_pairs
from cwpo_dist.lm.ids import common_prefix, ids_of
from cwpo_dist.lm.reading import PairEncoder
from cwpo_dist.lm.rows import Row, collate
from cwpo_dist.lm.templates import Fault, TokenError
from cwpo_dist.pairs.messages import extra_keys, plain_text
from cwpo_dist.pairs.parsing import ParsedPair
from cwpo_dist.pairs.records import Text, answer_id, prompt_id, prompt_of
from cwpo_dist.planning.costs import AnswerLengths, Lengths

_SPREAD = 3.0  # standard errors by which a sample must exceed a share to say that all pairs do


@dataclass(frozen=True)
class SampleRead:
    """What one model makes of the sampled pairs.

    Attributes:
        lengths: of the pairs that fit, and of their prompts and answers.
        number: how many were sampled.
        too_long: how many it could read, but for their length.
        unread: how many it cannot read, by reason; of one an answer at least.
        answers: how many different answers stand in them.
        unread_answers: how many of these it cannot read.
        examples: what was said of the first of each reason.
        left_out: pairs in which its template leaves out all text of a role's message, by role.
        around: the tokens around an answer to each sampled prompt, by the prompt's id: its own, and
            those that end the answer; also where they do not fit.
    """

    lengths: Lengths
    number: int
    too_long: int
    unread: Mapping[Fault, int]
    answers: int
    unread_answers: int
    examples: Mapping[Fault, str]
    left_out: Mapping[str, int]
    around: Mapping[str, int]

    @property
    def refused(self) -> int:
        """How many it cannot read."""
        return sum(self.unread.values())

    def reads_none(self, *, of_pairs: bool) -> bool:
        """Whether it can read nothing, but for lengths: no answer of them, or no pair."""
        alike = self.unread.get(Fault.IDENTICAL, 0)
        apart = [(self.unread_answers, self.answers), (alike, self.number)]
        return any(n == of > 0 for n, of in ([(self.refused, self.number)] if of_pairs else apart))

    def exceeds(self, fraction: float, whole: bool, *, of_pairs: bool) -> bool:
        """Whether more than a share of all cannot be read, as far as a sample can tell.

        Args:
            fraction: the share that may be.
            whole: the sample is all there is.
            of_pairs: the model is trained on pairs; else it reads answers, and the share holds for
                them, and for pairs whose answers are alike to it.
        """
        alike = self.unread.get(Fault.IDENTICAL, 0)
        apart = [(self.unread_answers, self.answers), (alike, self.number)]
        shares = [(self.refused, self.number)] if of_pairs else apart
        return any(_exceeds(number, of, fraction, whole) for number, of in shares)

    def reasons(self) -> str:
        """In words, the most frequent first, each with what was said of its first pair."""
        ordered = sorted(self.unread.items(), key=lambda item: (-item[1], item[0]))
        return "; ".join(f"{n} × {fault} ({self.examples[fault]})" for fault, n in ordered)


def _exceeds(number: int, of: int, fraction: float, whole: bool) -> bool:
    if not number or number == of:
        return number > fraction * of
    doubt = 0.0 if whole else _SPREAD * sqrt(fraction * (1 - fraction) / of)
    return number / of > fraction + doubt


@dataclass(frozen=True)
class ShownRow:
    """A pair as a model sees it: decoded tokens, and what its mask lets through."""

    model: str
    prompt: str
    answers: tuple[str, ...]
    mask: tuple[str, ...]


def read_sample(model: ModelConfig, encoder: Encoder, sample: Sequence[ParsedPair]) -> SampleRead:
    """Reads the sampled pairs as the stages will."""
    pairs = [pair for pair in sample if not pair.alone]
    found = encode_pairs(encoder, model, [_given(pair) for pair in pairs])
    fitting = [row for row in found if isinstance(row, Row)]
    faults = [(error.fault, str(error)) for error in _errors(found) if error.fault]
    unread = Counter(fault for fault, _ in faults)
    too_long = unread.pop(Fault.OVER_LENGTH, 0)
    answers = _each_once(model, encoder, sample)
    return SampleRead(
        _lengths(fitting, len(pairs), _answer_lengths(answers)),
        len(pairs),
        too_long,
        unread,
        len(answers),
        sum(error.fault is not Fault.OVER_LENGTH for error in _errors(answers.values())),
        examples=dict(reversed(faults)),  # the first of each stays
        left_out=_left_out(encoder, pairs, found),
        around=_around(encoder, sample),
    )


def _around(encoder: Encoder, sample: Sequence[ParsedPair]) -> dict[str, int]:
    """Of prompts that it can read: what the row of an answer has beside the answer's own tokens."""
    pairs = {prompt_id(pair.prompt, pair.tools): pair for pair in sample}
    asked = [Asked(pair.prompt, [pair.first], pair.tools) for pair in pairs.values()]
    both = zip(pairs.items(), encoder.encode_all(asked), strict=True)
    found = {
        name: (row.n_tokens, plain_text(pair.first))
        for (name, pair), (row,) in both
        if isinstance(row, Row)
    }
    # A row does not say where its answer begins: a reward model's is prompt but for one token.
    own = ids_of(encoder.tokenizer, [text for _, text in found.values()])
    return {name: n - len(ids) for (name, (n, _)), ids in zip(found.items(), own, strict=True)}


def _errors(rows: Iterable[Row | TokenError]) -> list[TokenError]:
    return [row for row in rows if isinstance(row, TokenError)]


def _left_out(
    encoder: Encoder, pairs: Sequence[ParsedPair], rows: Sequence[Row | TokenError]
) -> Counter[str]:
    """The roles of which the template leaves out all text, in the pairs that it can read."""
    return Counter(
        role
        for pair, row in zip(pairs, rows, strict=True)
        if isinstance(row, Row)
        for role in encoder.left_out(pair.prompt, pair.first)
    )


def _lengths(rows: Sequence[Row], number: int, each: AnswerLengths) -> Lengths:
    if not rows:
        return Lengths(0.0, 0.0, 0.0, 0.0, each)
    return Lengths(
        len(rows) / number,
        fmean(row.n_tokens for row in rows),
        fmean(row.n_longest for row in rows),
        fmean(row.n_tokens - len(row.prompt) for row in rows),
        each,
    )


def _each_once(
    model: ModelConfig, encoder: Encoder, sample: Sequence[ParsedPair]
) -> dict[str, Row | TokenError]:
    """Reads the answers of the pairs once, in however many of them they stand; by their ids."""
    texts: dict[str, dict[str, Text]] = {}
    asked: dict[str, ParsedPair] = {}
    for pair in sample:
        prompt = prompt_id(pair.prompt, pair.tools)
        asked.setdefault(prompt, pair)
        named = {answer_id(prompt, text): text for text in (pair.first, pair.second)}
        texts.setdefault(prompt, {}).update(named)
    prompts = [
        Asked(pair.prompt, list(texts[prompt].values()), pair.tools)
        for prompt, pair in asked.items()
    ]
    rows = encode_answers(encoder, model, prompts)
    return {
        name: row
        for prompt, of in zip(asked, rows, strict=True)
        for name, row in zip(texts[prompt], of, strict=True)
    }


def _answer_lengths(answers: Mapping[str, Row | TokenError]) -> AnswerLengths:
    """Of those that fit, each once, beside the tokens that the answers of its prompt share."""
    fitting: dict[str, list[Row]] = {prompt_of(name): [] for name in answers}
    for name, row in answers.items():
        if isinstance(row, Row):
            fitting[prompt_of(name)].append(row)
    # By itself an answer may count as its prompt's but for its last token: what answers share
    # is what they begin with alike.
    shared = {prompt: common_prefix([row.prompt for row in fitting[prompt]]) for prompt in fitting}
    own = [row.n_tokens - shared[prompt] for prompt, rows in fitting.items() for row in rows]
    prompts = sum(shared.values()) / max(1, len(shared))
    number = max(1, len(answers))
    return AnswerLengths(len(own) / number, prompts, sum(own) / number)


def unrendered(encoders: Mapping[str, Encoder], sample: Sequence[ParsedPair]) -> Iterator[str]:
    """What the pairs hold that a model's chat template does not mention, for people."""
    for name, encoder in encoders.items():
        template, counts = str(encoder.tokenizer.chat_template), Counter[str]()
        for pair in sample:
            held = extra_keys((pair.prompt, pair.first, pair.second))
            held |= set() if pair.tools is None else {"tools"}
            counts.update(key for key in held if key not in template)
        if counts:
            listed = ", ".join(f"{key} (in {n} of {len(sample)})" for key, n in counts.items())
            yield (
                f"{name}: its chat template does not read what sampled pairs hold: {listed}; "
                "the model will not see it"
            )


def reading_notes(
    models: Mapping[str, ModelConfig],
    encoders: Mapping[str, Encoder],
    read: Mapping[str, SampleRead],
) -> Iterator[str]:
    """Which token each model is read at, on which date, and what of the pairs it does not see.

    Args:
        models: by the field that names each.
        encoders: by the same fields.
        read: by the same fields, what each makes of the sampled pairs.
    """
    for name, model in models.items():
        encoder, found = encoders[name], read[name]
        yield f"{name} {encoder.reads()}"
        if encoder.template.prints_date:
            yield (
                f"{name}: its chat template prints the date; it is {model.template_date:%d %b %Y} "
                f"every day ({name}.template_date)"
            )
        if found.refused:
            yield f"{name}: {found.refused} of {found.number} sampled pairs are set aside: " + (
                found.reasons()
            )
        # A gold model reads other answers, of which `sampled_answers` tells.
        if found.too_long and name != "evaluate.gold_model":
            share = found.too_long / found.number
            yield f"{name}: {share:.0%} of the sampled pairs are too long and left out"
        for role, number in sorted(found.left_out.items()):
            yield (
                f"{name}: its chat template writes nothing of messages of role {role!r} in "
                f"{number} of {found.number} sampled pairs"
            )


def shown_rows(
    models: Mapping[str, ModelConfig],
    encoders: Mapping[str, Encoder],
    pairs: Sequence[ParsedPair],
) -> Iterator[ShownRow]:
    """Pairs as shared rows of each model; what the mask lets through is read off the real mask.

    Args:
        models: by the field that names each.
        encoders: by the same fields.
        pairs: one after the other.
    """
    for pair in pairs:
        for name, model in models.items() if not pair.alone else ():
            yield _shown_row(name, model, encoders[name], pair)


def _shown_row(field: str, model: ModelConfig, encoder: Encoder, pair: ParsedPair) -> ShownRow:
    (row,) = encode_pairs(encoder, model, [_given(pair)])
    if isinstance(row, TokenError):
        return ShownRow(field, "", (), (f"nothing: the pair is set aside: {row.fault}: {row}",))
    decode = encoder.tokenizer.decode
    lines = _whole(row) if isinstance(encoder, PairEncoder) else _masked(row)
    return ShownRow(
        field, str(decode(row.prompt)), tuple(str(decode(a)) for a in row.answers), tuple(lines)
    )


def _masked(row: Row) -> list[str]:
    """What the last token of each answer sees."""
    batch = collate([row], "shared", 0)
    positions, allowed = batch.position_ids[0], batch.attention_mask[0, 0]
    lines = [f"prompt: {len(row.prompt)} tokens at positions 0–{len(row.prompt) - 1}"]
    start = len(row.prompt)
    for name, answer in zip("ab", row.answers, strict=False):
        span = slice(start, start + len(answer))
        seen = int(allowed[span.stop - 1].sum())
        first, last = int(positions[span.start]), int(positions[span.stop - 1])
        lines.append(
            f"{name}: {len(answer)} tokens at positions {first}–{last}; its last token sees {seen} "
            f"of {batch.input_ids.shape[1]}"
        )
        start = span.stop
    return lines


def _whole(row: Row) -> list[str]:
    """Each answer with the question, a sequence of its own."""
    return [
        f"{name}: {len(row.prompt)} tokens of the question and {len(answer)} of the answer, read "
        "as one sequence"
        for name, answer in zip("ab", row.answers, strict=False)
    ]


def _given(pair: ParsedPair) -> Asked:
    return Asked(pair.prompt, (pair.first, pair.second), pair.tools)
