"""Every causal language model that transformers has, tiny, through the product; a table of it.

    python tests/architectures.py docs/architectures.md

Of each model type a random model of width 32 is made and loaded, planned, trained for three steps
by SFT and by DPO, whole and with LoRA, exported, and read again by transformers alone. The table
says what was chosen and the largest difference that was seen, or by which words it is refused.
"""

from __future__ import annotations

import gc
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from exported_runs import Alone
from tiny_kinds import LEFT_OUT, NAMES, make
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from cwpo_dist.config import LoraConfig, ModelConfig, TrainingConfig
from cwpo_dist.lm.encoder import load_tokenizer
from cwpo_dist.lm.generation import generate
from cwpo_dist.lm.loading import ModelError, load_policy
from cwpo_dist.lm.modules import AnswerLogProbs
from cwpo_dist.lm.probe import choose_layout
from cwpo_dist.lm.recompute import let_recompute, start_training
from cwpo_dist.lm.rows import Layout, Row, collate
from cwpo_dist.runs.model_checks import check_model
from cwpo_dist.runs.sizes import policy
from cwpo_dist.storage import Store
from cwpo_dist.training import saving
from cwpo_dist.training.loop import Hooks, Run, train
from cwpo_dist.training.lora import add_lora
from cwpo_dist.training.merge_check import MergeMismatch
from cwpo_dist.training.tasks import Preference, Sft, Task
from cwpo_dist.training.torch_engine import TorchEngine

LONGEST = 64
STEPS = 3
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0)


@dataclass(frozen=True)
class Outcome:
    """What came of one architecture.

    Attributes:
        name: its model type, and which of it.
        attention: what transformers takes for it.
        layout: of its rows.
        reason: of that layout.
        log_probs: the largest difference from stock plain rows, in nats an answer.
        gradient: relative error of the flat gradient of both answers of all rows.
        full: the largest difference between the trained model and its export, in nats an answer.
        lora: the same of the merged model; words where LoRA is refused.
        answers: how answers are sampled: 'in batches', 'one by one', or why not.
        refused: by which words, where it is.
    """

    name: str
    attention: str = ""
    layout: str = ""
    reason: str = ""
    log_probs: float = 0.0
    gradient: float = 0.0
    full: float = 0.0
    lora: float | str = 0.0
    answers: str = ""
    refused: str = ""


def rows(number: int = 6, seed: int = 3) -> list[Row]:
    """Random tokens, two answers a row, prompts and answers of 2 to 29 tokens."""
    draw = torch.Generator().manual_seed(seed)

    def some() -> list[int]:
        length = int(torch.randint(2, 30, (1,), generator=draw))
        return torch.randint(3, 260, (length,), generator=draw).tolist()

    return [Row(some(), ([*some(), 1], [*some(), 1])) for _ in range(number)]


def stock(folder: Path | str) -> PreTrainedModel:
    """As transformers alone loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def plain(model: Any, given: list[Row]) -> Tensor:
    """Log-probs of answers by a stock model, each answer alone, without pads or masks."""
    found = []
    rope = getattr(model.config, "rope_parameters", None) or {}
    for row in given:
        for answer in row.answers:
            ids, start = torch.tensor([row.prompt + answer]), len(row.prompt)
            if rope.get("rope_type") == "dynamic":  # stretched by a row until a short one comes
                model(input_ids=ids[:, :1], use_cache=False)
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
            logps = logits[start - 1 : -1].log_softmax(-1)
            found.append(logps.gather(1, ids[0, start:, None]).sum())
    return torch.stack(found)


def walk(name: str, folder: Path) -> Outcome:
    """Everything that the product does with a model, as far as it goes."""
    with _hushed():
        make(name, folder / "model")
        outcome = _walked(Outcome(name), folder)
    gc.collect()
    return outcome


def _walked(outcome: Outcome, folder: Path) -> Outcome:
    model = ModelConfig(
        model_name_or_path=str(folder / "model"), max_length=LONGEST, chat_template="plain"
    )
    planned = check_model("policy", model, policy, {"align": _config(None)})
    if planned.faults:
        return replace(outcome, refused=_told(planned.faults[0], folder))
    given, base = rows(), stock(folder / "model")
    with torch.no_grad():
        wanted = plain(base, given)
    module = AnswerLogProbs(load_policy(model, device="cpu")).eval()
    choice = choose_layout(module, longest=LONGEST)
    with torch.no_grad():
        found = module(collate(given, choice.layout, 2))
    outcome = replace(
        outcome,
        attention=base.config._attn_implementation,
        layout=choice.layout,
        reason=choice.reason,
        log_probs=_largest(found, wanted),
        gradient=_gradient_error(module, choice.layout, base, given),
        full=_trained(model, None, choice.layout, given, folder / "full"),
    )
    adapted = check_model("policy", model, policy, {"align": _config(LORA)})
    lora: float | str
    if adapted.faults:
        lora = _told(adapted.faults[0], folder)
    else:
        lora = _or_words(
            lambda: _trained(model, LORA, choice.layout, given, folder / "lora"), MergeMismatch
        )
    return replace(outcome, lora=lora, answers=_sampled(model, given))


def _config(lora: LoraConfig | None) -> TrainingConfig:
    return TrainingConfig(
        learning_rate=0.01,
        lr_scheduler_type="constant",
        max_steps=STEPS,
        global_batch_size=4,
        max_tokens_per_micro_batch=200,
        lora=lora,
    )


def _trained(
    model: ModelConfig, lora: LoraConfig | None, layout: Layout, given: list[Row], folder: Path
) -> float:
    """Three steps of SFT and three of DPO; how far the export is from what was trained."""
    loaded: Any = load_policy(model, device="cpu")
    if loaded.supports_gradient_checkpointing:
        let_recompute(loaded)
    loaded.config.use_cache = False
    adapted = loaded.requires_grad_(True) if lora is None else add_lora(loaded, lora, "logps", 0)
    module = AnswerLogProbs(adapted).eval()
    choose_layout(module, longest=LONGEST)  # as a worker does: it may set attention and scale
    config = _config(lora)
    engine, run = TorchEngine(module, config), Run(config, 0, layout, 2)
    with torch.no_grad():
        reference = module(collate(given, layout, 2)).view(-1, 2).tolist()
    names = [f"pair {number}" for number in range(len(given))]
    chosen = [Row(row.prompt, row.answers[:1]) for row in given]
    weights = [0.5 + 0.1 * number for number in range(len(given))]
    tasks: tuple[Task, ...] = (
        Sft(chosen, names),
        Preference(given, names, weights, reference, "sigmoid", 0.1),
    )
    for task in tasks:
        start_training(module)
        train(task, engine, run, Hooks())
    module.eval()
    with torch.no_grad():
        wanted = module(collate(given, layout, 2))
    if float((wanted - torch.tensor(reference).flatten()).abs().max()) < 1e-2:
        raise AssertionError("three steps of each moved nothing")
    tokenizer, store = load_tokenizer(model), Store(str(folder))
    if lora is None:
        saving.export_full(Alone(), loaded, tokenizer, store, lambda: None)
    else:
        trained = saving.gather_weights(Alone(), adapted, saving.trainable_names(adapted))
        saving.export_lora(adapted, trained, tokenizer, store, model, "logps", 0, lambda: None)
    with torch.no_grad():
        return _largest(plain(stock(folder / "model"), given), wanted)


def _gradient_error(module: AnswerLogProbs, layout: Layout, base: Any, given: list[Row]) -> float:
    """Of the flat gradient of a weighted sum of log-probs, in two micro-batches."""
    weights = torch.linspace(-1, 1, 2 * len(given))
    module.requires_grad_(True)
    start_training(module)
    for part, own in ((given[:2], weights[:4]), (given[2:], weights[4:])):
        (module(collate(part, layout, 2)) * own).sum().backward()
    base.requires_grad_(True)
    (plain(base, given) * weights).sum().backward()
    ours = dict(module.model.named_parameters())
    squares, total = 0.0, 0.0
    for name, parameter in base.named_parameters():
        theirs = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found = ours[name].grad
        mine = torch.zeros_like(parameter) if found is None else found.to_dense()
        squares += float((mine - theirs).double().square().sum())
        total += float(theirs.double().square().sum())
    return (squares / total) ** 0.5


def _sampled(model: ModelConfig, given: list[Row]) -> str:
    """Whether answers of a batch are those of prompts alone, greedy and drawn."""
    loaded, tokenizer = load_policy(model, device="cpu"), load_tokenizer(model)
    prompts = [row.prompt for row in given]
    settings: dict[str, Any] = {"max_new_tokens": 8, "seed": 0}

    def both(batch_size: int) -> list[str]:
        return [
            text
            for temperature in (0.0, 0.9)
            for text in generate(
                loaded,
                tokenizer,
                prompts,
                batch_size=batch_size,
                temperature=temperature,
                **settings,
            )
        ]

    with _records() as records:
        try:
            together = both(len(prompts))
        except ModelError as error:
            return str(error)
    if together != both(1):
        return "DEPEND ON THE BATCH"
    alone = any("one by one" in record for record in records)
    return "one by one" if alone else "in batches"


def _or_words(act: Callable[[], float], *refusals: type[Exception]) -> float | str:
    try:
        return act()
    except refusals as error:
        return str(error)


def _largest(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max().nan_to_num(torch.inf))


def _told(message: str, folder: Path) -> str:
    """A refusal without where the model lies here."""
    return message.replace(str(folder / "model"), "MODEL")


@contextmanager
def _records() -> Iterator[list[str]]:
    """What the product logs meanwhile."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]  # of this one handler
    logger = logging.getLogger("cwpo_dist")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


@contextmanager
def _hushed() -> Iterator[None]:
    """What transformers and peft say of tiny configurations is of no use here."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers_logging.set_verbosity(level)


def table(outcomes: list[Outcome]) -> str:
    """The page, as Markdown."""
    lines = [
        "# Architectures",
        "",
        f"Made by `{COMMAND}`: every model type that transformers "
        f"{version('transformers')} loads as a causal language model, tiny and random, under peft "
        f"{version('peft')} and torch {version('torch')}, in fp32 on a CPU.",
        "",
        "Of each: the layout of its rows ([packed, shared or plain](training.md#rows)); the "
        "largest difference of an answer's log-prob from the stock model's, for which each answer "
        f"is a sequence by itself, in nats; the relative error of the gradient; after {STEPS} "
        f"steps of SFT and {STEPS} of DPO, whole and with LoRA on all linear layers, the largest "
        "difference "
        "between the model in training and its exported folder, as transformers alone reads it; "
        "and how answers are sampled. What is refused, `cwpo plan` refuses in these words.",
        "",
        "| model type | attention | rows | log-probs | gradient | full | LoRA | answers |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(outcome) for outcome in outcomes if not outcome.refused),
        "",
        "## Plain rows, and why",
        "",
        *(
            f"- {each.name}: {each.reason}"
            for each in outcomes
            if each.layout == "plain" and not each.refused
        ),
        "",
        "## Refused",
        "",
        *(f"- {each.name}: {each.refused}" for each in outcomes if each.refused),
        "",
        "## Not tried",
        "",
        "Types without a tiny configuration in `tests/tiny_kinds.py`:",
        "",
        *(f"- {kind}: {why}" for kind, why in LEFT_OUT.items()),
        "",
    ]
    return "\n".join(lines)


def _line(each: Outcome) -> str:
    lora = each.lora if isinstance(each.lora, str) else f"{each.lora:.0e}"
    cells = (
        each.name,
        each.attention,
        each.layout,
        f"{each.log_probs:.0e}",
        f"{each.gradient:.0e}",
        f"{each.full:.0e}",
        lora,
        each.answers,
    )
    return f"| {' | '.join(cells)} |"


COMMAND = "make architectures"


def main(page: str, *names: str) -> None:
    """Walks all architectures, or those of the names, and writes the page."""
    outcomes = []
    for name in names or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            outcome = walk(name, Path(folder))
        print(outcome.refused or _line(outcome), flush=True)  # noqa: T201 - the page takes minutes
        outcomes.append(outcome)
    Path(page).parent.mkdir(exist_ok=True)
    Path(page).write_text(table(outcomes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
