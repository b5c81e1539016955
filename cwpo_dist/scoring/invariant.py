"""Rows in; one number an answer out, with the same bits in whatever company it is computed.

Two ways, both by construction a function of one answer's tokens, prompt included:

- packed rows by products of fixed shapes (lm/fixed_shapes.py), nearly as fast as without;
- each answer in a forward pass of its own, for models that take no packed rows or have products of
  other shapes. What a batch or a shared prompt would save is not saved.

Neither is believed before it is seen: when an actor starts, random answers are scored in several
companies and alone. One thread computes on a CPU: several would cut a tensor where its size says.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from cwpo_dist.lm.fixed_shapes import BLOCK, FixedShapes, same_bits
from cwpo_dist.lm.foreign import FOREIGN_ERRORS, model_fault
from cwpo_dist.lm.loading import ModelError
from cwpo_dist.lm.modules import AnswerScores, unwrapped
from cwpo_dist.lm.rows import Layout, Row, RowBatch, collate
from cwpo_dist.lm.stock import RowLengths, apart, closed_rows
from cwpo_dist.scoring.forward import RowForward

logger = logging.getLogger(__name__)

FIELD = "annotate.batch_invariant"
_WHOLE = 16  # tokens: a vector loop over such a tensor has no rest that goes another way
# Of probe rows without EOS: around the tiles of attention, as short as can be, a block in all.
_PROBED: tuple[RowLengths, ...] = (
    *((7, (5, 9)), (1, (1, 2)), (62, (2, 1)), (70, (61,)), (31, (40, 17, 3))),
)
_ALONE = 4  # answers of the probe that are scored by themselves, each at the cost of a block


class InvariantForward(RowForward):
    """A reward model applied to rows, so that no answer's bits depend on the others."""

    def __init__(self, module: AnswerScores, pad_id: int, max_length: int, max_tokens: int) -> None:
        """Chooses the faster way that is proved on this model and device.

        Raises:
            ModelError: naming the setting, where there is none.
        """
        super().__init__(module, pad_id, max_length, max_tokens)
        self._name = type(unwrapped(module.model)).__name__
        if self.device.type == "cpu" and torch.get_num_threads() > 1:
            logger.warning(
                "%s: one thread computes here, of %d; give cpus_per_actor: 1 and more actors",
                *(FIELD, torch.get_num_threads()),
            )
            torch.set_num_threads(1)
        self._rows = self._probe_rows(max_length)
        self.tiled = self._tiles()
        if not self.tiled and not self._same_in_any_company():
            raise ModelError(
                f"{FIELD}: {self._name} on {self.device} gives an answer other bits from one pass "
                "to the next, alone as it is; leave the setting out, or score on other devices"
            )

    def _tiles(self) -> bool:
        """Whether packed rows of fixed shapes are proved; says once what was chosen, and why."""
        try:
            reason = self._obstacle()
        except FOREIGN_ERRORS as error:
            reason = model_fault(error)
        if reason is None:
            logger.info("%s: %s, packed rows by fixed shapes", FIELD, self._name)
            return True
        logger.warning(
            "%s: %s, each answer in a pass of its own, which is slower, as %s",
            *(FIELD, self._name, reason),
        )
        return False

    def _obstacle(self) -> str | None:
        self.tiled = True
        if self.layout != "packed":
            return f"it takes {self.layout} rows"
        self._packed(self._laid_out(self._rows), FixedShapes(proving=True))
        if self._same_in_any_company():
            return None
        return "packed rows of fixed shapes have other bits in other batches"

    def _same_in_any_company(self) -> bool:
        """Whether each answer of the probe has the same bits twice, beside others, and alone."""
        rows = self._rows
        turned = [row.part(slice(None, None, -1)) for row in reversed(rows)]
        companies = [rows, turned, [*turned, *rows], apart(rows)]
        companies += [[row] for row in apart(rows)[:_ALONE]]
        if self.module.reads_last_token:  # else where its prompt ends is part of what it reads
            companies.append([_longer_prompt(row) for row in apart(rows)])
        expected = dict(self._by_answer(rows))
        return all(
            same_bits(number, expected[answer])
            for company in companies
            for answer, number in self._by_answer(company)
        )

    def _by_answer(self, rows: list[Row]) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Each answer's tokens, the prompt's before them, and its number in this batch."""
        found, _ = self._batch(self._laid_out(rows))
        for row, number in zip(apart(rows), found, strict=True):
            yield (*row.prompt, *row.answers[0]), number

    def _probe_rows(self, max_length: int) -> list[Row]:
        fitting = [each for each in _PROBED if each[0] + max(each[1]) < max_length]
        config = unwrapped(self.module.model).config.get_text_config()
        return closed_rows(config, fitting or [(1, (1, 2))])[0]

    def _plan(self, rows: list[Row]) -> list[list[int]]:
        """Batches filled up to whole blocks, longest rows first: only the last has much to fill."""
        if not self.tiled:
            return super()._plan(rows)
        lengths = [row.n_tokens for row in rows]
        room = max(1, self.max_tokens // BLOCK) * BLOCK - 2 * _WHOLE
        batches: list[list[int]] = []
        filled: list[int] = []
        for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
            fitting = (i for i, tokens in enumerate(filled) if tokens + lengths[row] <= room)
            number = next(fitting, len(batches))
            if number == len(batches):
                batches.append([])
                filled.append(0)
            batches[number].append(row)
            filled[number] += lengths[row]
        return batches

    def _laid_out(self, rows: list[Row]) -> list[RowBatch]:
        """Packed rows with one of pads behind them, to a whole number of vectors; or each alone."""
        if not self.tiled:
            layout: Layout = "packed" if self.layout == "packed" else "plain"
            batches = [collate([row], layout, self.pad_id) for row in apart(rows)]
        else:
            missing = -(sum(row.n_tokens for row in rows) + 2) % _WHOLE
            filler = Row([self.pad_id] * (1 + missing), ([self.pad_id],))
            batches = [collate([*rows, filler], "packed", self.pad_id)]
        return [batch.pinned(self.device) for batch in batches]

    def _batch(self, laid_out: list[RowBatch]) -> tuple[Tensor, int]:
        return self._packed(laid_out, FixedShapes()) if self.tiled else super()._batch(laid_out)

    def _packed(self, laid_out: list[RowBatch], shapes: FixedShapes) -> tuple[Tensor, int]:
        (batch,) = laid_out
        with torch.inference_mode(mode=False), torch.no_grad(), shapes:
            output_A = self.module(batch.to(self.device)).float()
        return output_A[:-1], -(-batch.padded_tokens // BLOCK) * BLOCK


def _longer_prompt(row: Row) -> Row:
    """The same tokens, where the first of the answer counts as the prompt's."""
    (answer,) = row.answers
    return Row([*row.prompt, answer[0]], (answer[1:],))
