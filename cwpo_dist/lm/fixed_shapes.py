"""A forward pass of packed rows in; the same, by products whose shapes know no batch, out.

A sum of floats depends on its order, and a library picks the order by the shape of a product: the
same row of a matrix, multiplied among more rows, may come out with other last bits. Here every
product of a forward pass has a shape that the tokens of one answer decide, or that nothing does:

- products with weights take `BLOCK` rows, the last block filled up with zeros. Which of these rows
  a token lies in depends on the batch, so whoever uses this first proves that it makes no
  difference (`proving`): each kind of product takes one row in all places, and must give it the
  same bits in each;
- attention takes `TILE` queries, those of the positions k·TILE … of one answer, and all keys up to
  the last of them. Positions count from the answer's own first token, prompt included, so that it
  makes no difference which part of it was computed once for several answers.

Everything else in a decoder is computed token by token. What is neither (a convolution, experts
that are multiplied in one batched product, another library's kernel) is refused when it is met.

Shapes: T tokens, H heads, D width of a head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar, Token
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers.integrations.sdpa_attention import repeat_kv

# Another size gives other bits: whoever changes one raises FORMAT_OF["annotate"].
BLOCK = 1024  # rows of a product: fewer cost speed, more are filled up in vain
TILE = 64  # queries of one attention; it divides the 512 keys that torch's CPU kernel takes at once

# What multiplies or mixes rows, by its name in torch.
_PRODUCT = re.compile(r"mm$|mm_|mv$|dot|conv|linear|attention|rnn|lstm|gru|scan")
_ALIGNED = 64  # bytes; kernels read the first elements of other addresses one by one

_active: ContextVar[bool] = ContextVar("fixed_shapes", default=False)


class UnfitError(RuntimeError):
    """A model, or a device, whose products do not go by fixed shapes; the message says which."""


def active() -> bool:
    """Whether attention, too, is to be computed by tiles."""
    return _active.get()


class FixedShapes(TorchDispatchMode):
    """While it is entered, products take blocks of rows; not with `torch.inference_mode`.

    torch hands over whole layers in that mode, and single products only with `torch.no_grad`.
    """

    def __init__(self, *, proving: bool = False) -> None:
        """Proves also, where asked, that the place of a row in its block makes no difference."""
        super().__init__()  # type: ignore[no-untyped-call]  # torch types none of the three
        self._proved: set[tuple[object, ...]] | None = set() if proving else None

    def __enter__(self) -> FixedShapes:
        """Takes over all products of this thread."""
        assert not torch.is_inference_mode_enabled(), "layers would come as a whole"
        self._token: Token[bool] = _active.set(True)
        super().__enter__()  # type: ignore[no-untyped-call]  # of torch, which has no types
        return self

    def __exit__(self, *error: object) -> None:
        """Leaves them to torch again."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # as above
        _active.reset(self._token)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """One operation of torch."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.mm.default:
            return self._blocks(torch.mm, *args)
        if func is torch.ops.aten.addmm.default and not kwargs and args[0].dim() == 1:
            return self._blocks(partial(torch.addmm, args[0]), *args[1:])
        _refuse_unknown(func, args)
        return func(*args, **kwargs)

    def _blocks(self, product: Callable[..., Tensor], rows_TI: Tensor, weight_IO: Tensor) -> Tensor:
        """[T, O], a block of rows at a time."""
        if rows_TI.shape[1] == 1:  # a single product an element: nothing to sum
            return product(rows_TI, weight_IO)
        if self._proved is not None:
            self._prove(product, rows_TI, weight_IO)
        # Kernels take another way, and so other sums, for other strides and other addresses.
        rows_TI = rows_TI.contiguous()
        if rows_TI.data_ptr() % _ALIGNED:
            rows_TI = rows_TI.clone()
        missing = -len(rows_TI) % BLOCK
        output_TO = rows_TI.new_empty(len(rows_TI) + missing, weight_IO.shape[1])
        for block, output in zip(rows_TI.split(BLOCK), output_TO.split(BLOCK), strict=True):
            whole = pad(block, (0, 0, 0, BLOCK - len(block))) if len(block) < BLOCK else block
            product(whole, weight_IO, out=output)
        return output_TO[: len(rows_TI)]

    def _prove(self, product: Callable[..., Tensor], rows_TI: Tensor, weight_IO: Tensor) -> None:
        """One row in all places of a block; once for each kind of product."""
        place = weight_IO.data_ptr() % _ALIGNED
        kind = (weight_IO.shape, weight_IO.stride(), weight_IO.dtype, place, product is torch.mm)
        assert self._proved is not None
        if kind in self._proved:
            return
        self._proved.add(kind)
        found = rows_TI.new_empty(BLOCK, weight_IO.shape[1])
        product(rows_TI[-1:].expand(BLOCK, -1).contiguous(), weight_IO, out=found)
        if not same_bits(found, found[:1].expand_as(found)):
            inner, outer = weight_IO.shape
            raise UnfitError(
                f"a product of {inner} × {outer} gives a row other bits by its place among {BLOCK}"
            )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one type have the same bits, also where these say NaN."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


def _refuse_unknown(func: OpOverload, args: tuple[Any, ...]) -> None:
    """Stops at a product that is neither of blocks nor of tiles."""
    if func.namespace not in {"aten", "prim"}:
        raise UnfitError(f"{func.name()} is not an operation of torch itself")
    name = func.name().partition("::")[2].partition(".")[0]  # without its overload
    if not _PRODUCT.search(name):
        return
    if name == "bmm" and args[0].shape[2] == 1:  # rotary angles: position × frequency
        return
    raise UnfitError(f"it multiplies by aten::{name}, whose shape depends on the batch")


def by_tile(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[Sequence[int]],
    scaling: float | None,
) -> Tensor:
    """Attention of packed rows, a tile of one answer's queries at a time.

    Args:
        query: [1, H, T, D].
        key: [1, H or fewer, T, D].
        value: as `key`.
        lengths: tokens of each row's prompt and of its answers.
        scaling: of the scores; None: D^(−½).

    Returns:
        [1, H, T, D].
    """
    with _disable_current_modes():  # thousands of small steps, all of them known
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        pieces: list[Tensor] = []
        start = 0
        for prompt, *answers in lengths:
            shared = range(start, start + prompt)
            pieces += _tiles(query, key, value, shared[:0], shared, scaling)
            start += prompt
            for length in answers:
                own = range(start, start + length)
                pieces += _tiles(query, key, value, shared, own, scaling)
                start += length
        return torch.cat(pieces, dim=2)


def _tiles(
    query: Tensor, key: Tensor, value: Tensor, shared: range, own: range, scaling: float | None
) -> Iterator[Tensor]:
    """Attention of one answer's own tokens, [1, H, own, D] in pieces, of which `shared` is read."""
    first, end = len(shared), len(shared) + len(own)
    before, after = first % TILE, -end % TILE
    q_tiles = torch.cat([_zeros(query, before), _part(query, own), _zeros(query, after)], dim=2)
    k_seen, v_seen = (
        torch.cat([_part(each, shared), _part(each, own), _zeros(each, after)], dim=2)
        for each in (key, value)
    )
    for number, tile in enumerate(q_tiles.split(TILE, dim=2), first // TILE):
        seen, position = (number + 1) * TILE, number * TILE
        mask = _causal(number, query.dtype, query.device)
        output = scaled_dot_product_attention(
            tile, k_seen[:, :, :seen], v_seen[:, :, :seen], attn_mask=mask, scale=scaling
        )
        yield output[:, :, max(0, first - position) : end - position]


def _part(tensor: Tensor, tokens: range) -> Tensor:
    return tensor[:, :, tokens.start : tokens.stop]


def _zeros(like: Tensor, tokens: int) -> Tensor:
    return like.new_zeros(*like.shape[:2], tokens, like.shape[3])


@lru_cache(maxsize=64)  # of the tiles of 4,096 positions: 33 MiB in fp32
def _causal(number: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a tile's attention adds to its scores: −∞ for the keys after a query."""
    mask = torch.full((TILE, (number + 1) * TILE), float("-inf"), dtype=dtype, device=device)
    return mask.triu(number * TILE + 1)
