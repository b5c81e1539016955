"""A stock Hugging Face model in; a module from a batch of rows to log-probs or scores out.

Each module is one thing that a training engine can wrap: rows go in, one number an answer comes
out, and a weight is read only while a module that holds it runs, which is what ZeRO-3 needs. Only
answer tokens reach the vocabulary, and never all of them at once.

Shapes: B sequences, L padded length, H width, A answers, N answer tokens that count, V words.
"""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cwpo_dist.lm.heads import scoring_heads
from cwpo_dist.lm.last_layer import narrow
from cwpo_dist.lm.loading import ModelError
from cwpo_dist.lm.output_head import ChunkedHead
from cwpo_dist.lm.packed import packed_mask, told_of_pads
from cwpo_dist.lm.rope import turn_alone, turns_alone
from cwpo_dist.lm.rows import RowBatch

# Calling a module gives Any to the type checker: hence the four `no-any-return` below.

_LAST_TOKEN = frozenset({"ctrl", "modernbert-decoder"})  # decoders without a `score` head


class AnswerLogProbs(nn.Module):
    """Summed log-probs of answers under a causal language model (also wrapped by peft).

    Attributes:
        model: the model as given; the names of its parameters follow after `model.`.
        head: shares its parameters with `model`; `named_parameters` lists them once, there.
        squares: whether an answer has a second number, Σ log Σ_v p_v² over its tokens.
    """

    def __init__(self, model: nn.Module, *, squares: bool = False):
        """Finds the decoder and the output embeddings; LoRA layers inside them stay active.

        Raises:
            ModelError: for a model without output embeddings.
        """
        super().__init__()
        self.model, self.squares = model, squares
        core = unwrapped(model)
        lm_head = core.get_output_embeddings()
        if lm_head is None:
            raise ModelError(
                f"model: {type(core).__name__} has no output embeddings; give a causal LM"
            )
        decoder = decoder_of(core)
        self._decoder = (decoder,)
        narrow(decoder, "answers")
        turn_alone(decoder)
        _spare_dense_gradient(core.get_input_embeddings(), lm_head)
        self.head = ChunkedHead(lm_head, core.config.get_text_config())

    def forward(self, batch: RowBatch) -> Tensor:
        """Σ log p(answer token | what it may see), in nats, fp32 [A], in the order of the rows.

        With squares [A, 2].
        """
        numbers_N = self._of_tokens(batch, squares=self.squares)
        zeros_A = numbers_N.new_zeros(len(batch.last), *numbers_N.shape[1:])
        return batch.group.summed(zeros_A.index_add(0, batch.answer, numbers_N))

    def token_logps(self, batch: RowBatch) -> Tensor:
        """Log-prob of each answer token in nats, fp32 [N], in the order of `batch.target`."""
        return self._of_tokens(batch, squares=False)

    def _of_tokens(self, batch: RowBatch, *, squares: bool) -> Tensor:
        hidden_BLH = decode(self._decoder[0], batch)
        read_NH = hidden_BLH.flatten(0, 1)[batch.source]
        return self.head(read_NH, batch.target, squares=squares)  # type: ignore[no-any-return]  # nn.Module


class AnswerScores(nn.Module):
    """Scores of answers under a sequence classifier (also wrapped by peft), a label a head.

    A decoder is read at each answer's last token through its `score` head; any other classifier
    (BERT, DeBERTa) takes plain rows through its own forward.

    Attributes:
        model: the model as given; the names of its parameters follow after `model.`.
        heads: how many scores an answer has.
        reads_last_token: whether it is such a decoder, which can take shared rows.
        one_by_one: each sequence by itself, for classifiers that see the pads of a batch.
    """

    def __init__(self, model: nn.Module, *, token_types: bool = False):
        """Finds the decoder and its head.

        Args:
            model: the classifier.
            token_types: it is told prompt (0) from answer (1), as its tokenizer does.

        Raises:
            ModelError: for labels that are classes.
        """
        super().__init__()
        self.model = model
        core = unwrapped(model)
        heads = scoring_heads(core.config)
        if heads is None:
            raise ModelError(
                f"model: {type(core).__name__} has {core.config.num_labels} labels; a reward model "
                "has one"
            )
        self.heads = heads
        self.reads_last_token = scores_last_token(core) and hasattr(core, "score")
        self.one_by_one = False
        self._token_types = token_types and "token_type_ids" in signature(core.forward).parameters
        decoder = decoder_of(core)
        self._parts = (decoder, getattr(core, "score", None))
        turn_alone(decoder)
        if self.reads_last_token:
            narrow(decoder, "ends")
            _score_in_fp32(core.get_submodule("score"))

    def forward(self, batch: RowBatch) -> Tensor:
        """One score an answer, fp32 [A], in the order of the rows; of several heads [A, heads].

        Raises:
            ModelError: for other rows than plain ones where the classifier can read no others.
        """
        scores = self._scores(batch).float()
        return scores.flatten() if self.heads == 1 else scores

    def _scores(self, batch: RowBatch) -> Tensor:
        decoder, score = self._parts
        if self.reads_last_token:
            assert score is not None
            hidden_BLH = decode(decoder, batch)
            scores_A1 = score(hidden_BLH.flatten(0, 1)[batch.last // batch.group.size])
            return batch.group.summed(scores_A1 * batch.group.holds(batch.last)[:, None])
        if batch.layout != "plain":
            raise ModelError(
                f"model: {type(unwrapped(self.model)).__name__} reads whole sequences; "
                "collate its rows with layout 'plain'"
            )
        return self.stock(batch, one_by_one=self.one_by_one)

    def stock(self, batch: RowBatch, *, one_by_one: bool = True) -> Tensor:
        """What the classifier's own forward makes of plain rows, [A, heads].

        Args:
            batch: the rows.
            one_by_one: as the classifier is called for one sequence, without pads.
        """
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if self._token_types:
            assert batch.token_type_ids is not None
            given["token_type_ids"] = batch.token_type_ids
        with told_of_pads(some=len(set(batch.lengths)) > 1 and not one_by_one):
            if not one_by_one:
                return self.model(**given).logits  # type: ignore[no-any-return]  # nn.Module
            logits = [
                self.model(**{name: ids[s : s + 1, :length] for name, ids in given.items()}).logits
                for s, length in enumerate(batch.lengths)
            ]
        return torch.cat(logits)


def refuse_one_by_one(module: nn.Module) -> None:
    """Returns when a batch is one call: ranks must call a model that they share equally often.

    Raises:
        ModelError: for a classifier that sees the pads of a batch.
    """
    if isinstance(module, AnswerScores) and module.one_by_one:
        name = unwrapped(module.model).config.name_or_path
        raise ModelError(
            f"model_name_or_path: {name!r}: its scores depend on the pads of a batch, so it can "
            "score alone, but not be trained or shared by workers here; give another model"
        )


def accumulate_in_place(module: nn.Module) -> None:
    """Lets an output head add to its weight's gradient itself: less memory, and a pass fewer.

    For engines that read gradients off `.grad` after the backward pass, and use no hooks on them.
    """
    for head in module.modules():
        if isinstance(head, ChunkedHead):
            head.in_place = True


def decode(decoder: nn.Module, batch: RowBatch) -> Tensor:
    """The last hidden states [B, L, H] of a Hugging Face decoder on any layout."""
    arguments: dict[str, Tensor] = {"attention_mask": batch.attention_mask}
    # Plain rows leave positions to the model, unless a row's own length decides what they are.
    if batch.layout != "plain" or turns_alone(decoder):
        arguments["position_ids"] = batch.position_ids
    if batch.layout == "shared":
        dtype = next(decoder.parameters()).dtype
        arguments["attention_mask"] = additive(batch.attention_mask, dtype)
    if batch.layout == "packed":
        arguments["attention_mask"] = packed_mask(
            batch.attention_mask, batch.input_ids.device, batch.group
        )
    with told_of_pads(some=len(set(batch.lengths)) > 1):
        output = decoder(input_ids=batch.input_ids, use_cache=False, **arguments)
    return output.last_hidden_state  # type: ignore[no-any-return]  # nn.Module


def _score_in_fp32(head: nn.Module) -> None:
    """Has a head give its product unrounded: near a score of 2, bf16 has steps of 1/64.

    Its modules keep their names and are called as before, which ZeRO-3's hooks and peft's need.
    """
    for part in head.modules():
        if type(part) is nn.Linear:
            part.forward = partial(_fp32_linear, part)  # type: ignore[method-assign]  # of this one


def _fp32_linear(layer: nn.Linear, hidden_NH: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.float()
    return nn.functional.linear(hidden_NH.float(), layer.weight.float(), bias)


def _spare_dense_gradient(embeddings: nn.Module, lm_head: nn.Module) -> None:
    """Tied embeddings: the look-up's gradient comes as the few rows that it has.

    It is added to the head's, which is dense: the sum, all that anyone sees, is dense as ever, but
    no second matrix of the vocabulary is filled with zeros for each micro-batch.
    """
    if type(embeddings) is nn.Embedding and embeddings.weight is getattr(lm_head, "weight", None):
        embeddings.sparse = True
        pad, embeddings.padding_idx = embeddings.padding_idx, None
        if pad is not None:  # torch would count its places on the device, and the host wait
            embeddings.register_forward_hook(partial(_no_gradient_for, pad))


def _no_gradient_for(
    token: int, _: nn.Module, args: tuple[Tensor, ...], output_BLH: Tensor
) -> None:
    """Has a look-up give a token's row the gradient 0, as torch does for pads."""
    if output_BLH.requires_grad:
        is_token_BL1 = (args[0] == token)[..., None]
        output_BLH.register_hook(lambda gradient_BLH: gradient_BLH.masked_fill(is_token_BL1, 0.0))


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as stock attention adds it to its scores: 0 where allowed, else the minimum."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside a peft wrapper (with its LoRA layers), or the model itself."""
    inner = getattr(model, "get_base_model", None)
    return cast("PreTrainedModel", model if inner is None else inner())


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a causal LM or classifier that makes hidden states of tokens."""
    base = cast("PreTrainedModel", model.base_model)
    if base is not model:
        return base
    # A few classes name another prefix than that of their decoder (Llama 4).
    inner = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    return inner[0] if len(inner) == 1 else model


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole: DeepSpeed leaves a sharded parameter empty, and notes it down."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def scores_last_token(classifier: PreTrainedModel) -> bool:
    """Whether a stock classifier reads the last token of a sequence that is no pad.

    Decoders do, whose head transformers calls `score`, and two that have it under other names.
    """
    has_head = hasattr(classifier, "score") or classifier.config.model_type in _LAST_TOKEN
    has_decoder = decoder_of(classifier) is not classifier
    return has_head and has_decoder and not _has_encoder(classifier)


def _has_encoder(classifier: PreTrainedModel) -> bool:
    return bool(getattr(classifier.config, "is_encoder_decoder", False))
