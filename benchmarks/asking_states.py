"""Human pairs and a frozen model in; the last hidden state of each answer out, for asking.py.

Shapes: N pairs, A answers, H width of a hidden state.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import prepared, with_ray
from numpy.typing import NDArray

from cwpo_dist.config import ModelConfig
from cwpo_dist.demo import gold
from cwpo_dist.lm.loading import load_annotator_base
from cwpo_dist.lm.modules import AnswerScores, decode, decoder_of, unwrapped
from cwpo_dist.lm.reading import encoder_for
from cwpo_dist.lm.rows import RowBatch
from cwpo_dist.lm.sharing import SharedRows
from cwpo_dist.pairs.answers import read_compared
from cwpo_dist.pairs.records import prompt_of
from cwpo_dist.pairs.stored import read_pairs
from cwpo_dist.scoring.answers_in import AnswersIn, encoded
from cwpo_dist.scoring.forward import RowForward
from cwpo_dist.scoring.set_aside import SetAside
from cwpo_dist.weighting import Floats

Places = NDArray[np.intp]


@dataclass(frozen=True)
class Data:
    """Labelled pairs, and what a frozen model makes of their answers.

    Attributes:
        names: [N] ids.
        debates: [N] what is held out as a whole: of UKP a debate, which is two prompts, for and
            against; else a prompt.
        sides: [2, N] places of the answers a and b.
        labels: [N] 1 where people chose a, −1 where b.
        lengths: [A] characters.
        states: [A, H] standardised, over √H.
        gold: [A] by the demo's rule; None: unknown.
    """

    names: NDArray[np.str_]
    debates: NDArray[np.str_]
    sides: Places
    labels: Floats
    lengths: Floats
    states: Floats
    gold: Floats | None = None

    @cached_property
    def prompts(self) -> NDArray[np.str_]:
        """[N] of each pair."""
        return np.array([prompt_of(name) for name in self.names.tolist()])

    @property
    def gold_margin(self) -> Floats:
        """[N] of each pair, in the unit of its Bradley–Terry noise."""
        assert self.gold is not None, "of the demo's pairs"
        a, b = self.sides
        margin: Floats = (self.gold[a] - self.gold[b]) / gold.TEMPERATURE
        return margin

    @cached_property
    def answers(self) -> dict[str, Places]:
        """The places of each prompt's answers, as far as they stand in pairs."""
        a, b = self.sides
        of = {prompt: self.prompts == prompt for prompt in np.unique(self.prompts).tolist()}
        return {prompt: np.unique(np.concatenate([a[at], b[at]])) for prompt, at in of.items()}

    def differences(self, pairs: Places) -> Floats:
        """Of some pairs: a − b."""
        a, b = self.sides[:, pairs]
        difference: Floats = self.states[a] - self.states[b]
        return difference

    def every(self, n: int) -> Data:
        """Of n pairs one; all answers."""
        of = (getattr(self, name) for name in ("names", "debates", "labels"))
        names, debates, labels = (each[::n] for each in of)
        return replace(self, names=names, debates=debates, labels=labels, sides=self.sides[:, ::n])


def made(model: ModelConfig, data: str) -> dict[str, Any]:
    """The arrays of `Data`, with hidden states as they are."""
    encoder = encoder_for(model, "annotator")
    scores = AnswerScores(load_annotator_base(model, encoder.tokenizer, seed=0))
    forward = RowForward(scores, encoder.pad_id, model.max_length, 2048)
    decoder = decoder_of(unwrapped(scores.model))

    def what_the_head_reads(batch: RowBatch) -> torch.Tensor:
        return decode(decoder, batch).flatten(0, 1)[batch.last]

    scores.forward = what_the_head_reads  # type: ignore[method-assign]  # after its own checks
    states: dict[str, Any] = {}
    texts: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        store, _ = with_ray(lambda: prepared(Path(name), data, None, 100_000))
        for read in encoded(encoder, model, AnswersIn(store).read(0), SetAside(0)):
            shared = SharedRows.of([(prompt_of(each.name), row) for each, row in read])
            values = shared.of_each(forward(shared.rows).values)
            for (each, _), value in zip(read, values, strict=True):
                states[each.name], texts[each.name] = value, str(each.given.answer)
        pairs, compared = read_pairs(store, 0), read_compared(store, 0)
    place = {answer: k for k, answer in enumerate(states)}
    known = [
        (pair, place[of.answer_a], place[of.answer_b])
        for pair, of in zip(pairs, compared, strict=True)
        if pair.label is not None and {of.answer_a, of.answer_b} <= place.keys()
    ]
    arrays = {"gold": [gold.score("", text) for text in texts.values()]} if data == "demo" else {}
    return arrays | {
        "names": [pair.pair_id for pair, _, _ in known],
        "debates": [
            debate_of(str(pair.prompt)) if data == "ukp" else prompt_of(pair.pair_id)
            for pair, _, _ in known
        ],
        "sides": np.array([(a, b) for _, a, b in known]).T,
        "labels": [1.0 if pair.label == "a" else -1.0 for pair, _, _ in known],
        "lengths": [float(len(text)) for text in texts.values()],
        "states": np.array(list(states.values()), np.float32),
    }


def debate_of(prompt: str) -> str:
    """The title; the data spell that of one debate in two ways."""
    title = prompt.splitlines()[0].casefold()
    return "personal pursuit" if "personal pursuit" in title else title


def loaded(cache: Path) -> Data:
    """What `made` has put there; states standardised over all answers, of test debates as well."""
    with np.load(cache) as found:
        arrays = {name: found[name] for name in found.files}
    states = arrays.pop("states").astype(np.float64)
    states = (states - states.mean(0)) / states.std(0) / np.sqrt(states.shape[1])
    return Data(states=states, **arrays)
