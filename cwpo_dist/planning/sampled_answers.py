"""How long prompts are to models in; which answers sampled to them no model could read, out.

Nobody knows how long sampled answers get, but how long they may: an answer that ends at
`evaluate.max_new_tokens` is never judged where prompt and answer exceed the judge's `max_length`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cwpo_dist.config import Config, ModelConfig
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.planning.sampled import SampleRead

_GOLD = "evaluate.gold_model"
_OF_POLICY = (
    "; or set policy.over_length=drop, as answers to prompts that are cut are not read again"
)


def answer_faults(config: Config, read: Mapping[str, SampleRead]) -> Iterator[str]:
    """A gold model that could read no answer to any sampled prompt."""
    gold = config.evaluate.gold_model
    if gold is None or _GOLD not in read or not _is_bound(config, gold):
        return
    room = [gold.max_length - tokens for tokens in _asked(config, read[_GOLD], read).values()]
    if room and max(room) < 1:
        yield (
            f"{_GOLD}.max_length: no sampled prompt fits {gold.max_length} tokens with an answer, "
            f"so that GRA would be of nothing; raise it, or set {_GOLD}.over_length=truncate"
        )


def answer_notes(config: Config, read: Mapping[str, SampleRead], counted: Census) -> Iterator[str]:
    """Models that cannot read sampled answers which are as long as they may be."""
    gold = config.evaluate.gold_model
    if gold is not None and _GOLD in read:
        if _is_bound(config, gold):
            remedy = f", or set {_GOLD}.over_length=truncate"
            yield from _too_short(config, _GOLD, gold, "GRA", read, remedy)
        yield from _held_out(config, read[_GOLD], counted)
    policy, sampled = config.policy, config.evaluate.num_prompts > 0
    if config.evaluate.kl and sampled and policy is not None and policy.over_length == "truncate":
        yield from _too_short(config, "policy", policy, "KL", read, _OF_POLICY)


def _is_bound(config: Config, gold: ModelConfig) -> bool:
    """Whether it reads sampled answers, and leaves out what is too long."""
    return config.evaluate.num_prompts > 0 and gold.over_length == "drop"


def _asked(config: Config, of: SampleRead, read: Mapping[str, SampleRead]) -> dict[str, int]:
    """Tokens around an answer to each sampled prompt that the policy may be given, to one model."""
    policy = config.policy
    if policy is None or policy.over_length == "truncate":
        return dict(of.around)
    fitting = {name for name, n in read["policy"].around.items() if n < policy.max_length}
    return {name: n for name, n in of.around.items() if name in fitting}


def _too_short(
    config: Config,
    name: str,
    model: ModelConfig,
    figure: str,
    read: Mapping[str, SampleRead],
    remedy: str,
) -> Iterator[str]:
    """What to set so that an answer that is as long as it may be is read."""
    around, longest = _asked(config, read[name], read), config.evaluate.max_new_tokens
    cut = [tokens for tokens in around.values() if tokens + longest > model.max_length]
    if not cut:
        return
    room = model.max_length - max(cut)
    worth_it = room >= longest / 2  # below that they would be other answers
    lower = f", lower evaluate.max_new_tokens to {room}" if worth_it else ""
    yield (
        f"{name}.max_length: {model.max_length} tokens do not hold an answer of "
        f"evaluate.max_new_tokens ({longest}) to {len(cut)} of {len(around)} sampled prompts: "
        f"{figure} leaves such prompts out, more of them the longer an arm's answers are. Raise it "
        f"to {max(cut) + longest}{lower}{remedy}"
    )


def _held_out(config: Config, gold: SampleRead, counted: Census) -> Iterator[str]:
    """Pairs without a label, which gold would judge, were they shorter."""
    split = config.evaluate.split
    if gold.too_long and counted.labelled_pairs(split) < counted.pairs(split):
        share = gold.too_long / gold.number
        yield (
            f"{_GOLD}: {share:.0%} of the sampled pairs are too long for its max_length; those of "
            f"{split} are left out of accuracies by gold"
        )
