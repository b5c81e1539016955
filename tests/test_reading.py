"""Reward models are read where their authors read them: stock calls are the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from scored import scores_of
from test_templates import DAY, pinned
from tiny import CHAT_TEMPLATE, save_tiny, tiny_classifier, tiny_tokenizer, word_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.encoder import Asked
from cwpo_dist.lm.fitting import encode_pairs
from cwpo_dist.lm.loading import load_annotator_base, save
from cwpo_dist.lm.modules import AnswerScores
from cwpo_dist.lm.reading import PairEncoder, RenderingEncoder, encoder_for
from cwpo_dist.lm.rows import Row, collate
from cwpo_dist.lm.templates import TokenError
from cwpo_dist.pairs.stored import Pair
from cwpo_dist.scoring.forward import RowForward
from cwpo_dist.scoring.scorers import RewardWorker

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
Text = Any
Asking = tuple[Text, Text, Text]


@dataclass(frozen=True)
class Family:
    """A kind of published reward model: whose template, special tokens and decoder it has."""

    template: str
    arch: str
    eos: str
    pad: str
    bos: str | None = None
    marks: tuple[str, ...] = ()
    adds_bos: bool = False


FAMILIES = {
    # pad is EOS, and a newline is read
    "smollm2": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        *("llama", "<|im_end|>", "<|im_end|>"),
        marks=("<|im_start|>",),
    ),
    "qwen2.5": Family("qwen2_5", "qwen2", "<|im_end|>", "<|endoftext|>", marks=("<|im_start|>",)),
    "qwen3": Family("qwen3", "qwen3", "<|im_end|>", "<|endoftext|>", marks=("<|im_start|>",)),
    # the end of a turn is read, EOS never stands there
    "gemma": Family(
        *("gemma", "gemma2", "<eos>", "<pad>", "<bos>"),
        marks=("<start_of_turn>", "<end_of_turn>"),
        adds_bos=True,
    ),
    # a template that writes BOS, for a tokenizer that adds it too
    "llama3": Family(
        *("llama3", "llama", "<|eot_id|>", "<|pad|>", "<|begin_of_text|>"),
        marks=("<|start_header_id|>", "<|end_header_id|>"),
        adds_bos=True,
    ),
    "phi3": Family(
        *("phi3", "phi3", "<|endoftext|>", "<|endoftext|>"),
        marks=("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    ),
    # ends in EOS, which is the pad: a stock classifier reads the token before it
    "deepseek": Family(
        *("deepseek_r1_distill", "qwen2", "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        bos="<｜begin▁of▁sentence｜>",
        marks=("<｜User｜>", "<｜Assistant｜>"),
        adds_bos=True,
    ),
    # the newest token is a mark of the next turn
    "glm4": Family(
        *("glm4moe", "mistral", "<|endoftext|>", "<|endoftext|>"),
        marks=("<|user|>", "<|assistant|>", "[gMASK]", "<sop>"),
    ),
}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


PAIRS: list[Asking] = [
    ("What is two and two?", "It is four.", "Five, I am sure."),
    ("Name a colour.", "Red.  ", "Red is a colour, and so is blue; there are many others."),
    (
        [user("Hello"), assistant("Good day.\n"), user("How are you?")],
        [assistant("Well.")],
        [assistant("Not your business!")],
    ),
    ([user("  a question with room  ")], [assistant("yes")], [assistant("yes, the\n\n")]),
]


def family_folder(folder: Path, family: Family, seed: int = 0) -> Path:
    """A classifier of the family with its template and special tokens, trained for a moment."""
    tokenizer = tiny_tokenizer(add_bos=False)
    specials = {"eos_token": family.eos, "pad_token": family.pad}
    specials |= {"bos_token": family.bos} if family.bos else {}
    tokenizer.add_special_tokens(
        {**specials, "additional_special_tokens": list(family.marks)},
    )
    if family.adds_bos:
        tokenizer = tiny_tokenizer_with_bos(tokenizer, folder)
    file = TEMPLATES / f"{family.template}.jinja"
    tokenizer.chat_template = family.template if "{" in family.template else file.read_text()
    model = tiny_classifier(
        family.arch,
        seed,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    train_by_stock_means(model, tokenizer)
    save(model, tokenizer, folder)
    return folder


def tiny_tokenizer_with_bos(tokenizer: Any, folder: Path) -> Any:
    """The same, putting its own BOS in front of every text."""
    from tokenizers import processors

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def conversation(prompt: Text, answer: Text) -> list[dict[str, str]]:
    """As its authors would give it."""
    if isinstance(prompt, str):
        return [user(prompt), assistant(answer)]
    return [*prompt, *answer]


def stock_ids(tokenizer: PreTrainedTokenizerBase, prompt: Text, answer: Text) -> list[int]:
    given = conversation(prompt, answer)
    ids: list[int] = tokenizer.apply_chat_template(given, tokenize=True, return_dict=False)
    return ids


def stock_score(model: Any, tokenizer: Any, prompt: Text, answer: Text) -> torch.Tensor:
    ids = torch.tensor([stock_ids(tokenizer, prompt, answer)])
    score: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0]
    return score


def train_by_stock_means(model: Any, tokenizer: Any, steps: int = 2) -> None:
    """Bradley–Terry on the pairs, by transformers alone: the shorter answer is the better."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        margins = [
            stock_score(model, tokenizer, p, a) - stock_score(model, tokenizer, p, b)
            for p, a, b in PAIRS
        ]
        loss = -torch.nn.functional.logsigmoid(torch.stack(margins)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def worker_scores(model: ModelConfig, pairs: Sequence[Asking], tmp_path: Path) -> list[list[float]]:
    """By the worker that `annotate` runs; pairs of one kind a call, as a run has them."""
    found = {}
    for kind in (str, list):
        of_kind = [Pair(str(k), *p) for k, p in enumerate(pairs) if isinstance(p[0], kind)]
        found |= scores_of(
            tmp_path / f"of_{kind.__name__}",
            of_kind,
            lambda given: RewardWorker(given, model, "rm", 2048),
        )
    return [found[str(k)] for k in range(len(pairs))]


def assert_scores(found: list[list[float]], expected: list[list[float]]) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_ready_reward_model_scores_as_its_authors_call_it(name: str, tmp_path: Path) -> None:
    folder = family_folder(tmp_path / "rm", FAMILIES[name])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stock = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = [
            [float(stock_score(stock, tokenizer, p, y)) for y in answers] for p, *answers in PAIRS
        ]
    settings = ModelConfig(model_name_or_path=str(folder))
    assert_scores(worker_scores(settings, PAIRS, tmp_path), expected)
    # to be read at EOS, as a policy's answers are, would show
    policy = encoder_for(settings, "policy")
    rows = [policy.encode(p, [a]) for p, a, _ in PAIRS]
    with torch.no_grad():
        at_eos = [float(AnswerScores(stock)(collate([row], "plain", 0))) for row in rows]
    off = max(abs(a - b[0]) for a, b in zip(at_eos, expected, strict=True))
    assert off > 1e-2 or name == "llama3", "whose rendering ends in EOS, which is no pad"


PAIR_MODELS = {
    "bert": ("bert", {"pad_token_id": 2}),
    "electra": ("bert", {"pad_token_id": 2}),
    "deberta-v2": ("bert", {"pad_token_id": 2, "type_vocab_size": 2}),
    "distilbert": ("roberta", {"pad_token_id": 2}),
    # counts positions from behind its pad token, and pads at the end of its table
    "roberta": ("roberta", {"pad_token_id": 2, "max_position_embeddings": 514}),
}


def pair_folder(folder: Path, arch: str) -> Path:
    style, settings = PAIR_MODELS[arch]
    tokenizer = word_tokenizer(style)
    model = tiny_classifier(arch, vocab_size=len(tokenizer), **settings)
    save(model, tokenizer, folder)
    return folder


@pytest.mark.parametrize("arch", PAIR_MODELS)
def test_a_classifier_of_pairs_of_texts_reads_question_and_answer(
    arch: str, tmp_path: Path
) -> None:
    folder = pair_folder(tmp_path / "rm", arch)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stock = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    questions = [
        *("What is two and two?", "Name a colour."),
        "Hello\n\nGood day.\n\n\nHow are you?",
        "  a question with room  ",
    ]
    expected = []
    for question, (_, *answers) in zip(questions, PAIRS, strict=True):
        texts = [answer if isinstance(answer, str) else answer[0]["content"] for answer in answers]
        with torch.no_grad():
            given = [tokenizer(question, text, return_tensors="pt") for text in texts]
            expected.append([float(stock(**each).logits) for each in given])
    settings = ModelConfig(model_name_or_path=str(folder))
    assert_scores(worker_scores(settings, PAIRS, tmp_path), expected)
    # one text without a separator, as a language model takes it, is another input
    with torch.no_grad():
        joined = float(stock(**tokenizer(PAIRS[0][0] + PAIRS[0][1], return_tensors="pt")).logits)
    assert abs(joined - expected[0][0]) > 1e-3


JINJA = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}"
)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("template", ["tokenizer", "plain", "file"])
@pytest.mark.parametrize("kind", ["text", "messages"])
def test_what_fit_leaves_is_read_by_its_own_template(
    kind: str, template: str, adds_bos: bool, tmp_path: Path
) -> None:
    """Stock `apply_chat_template` gives the ids of training; so do `annotate`'s two ways."""
    (tmp_path / "mine.jinja").write_text(JINJA)
    save_tiny(tmp_path / "weak", "llama")
    tiny_tokenizer(pad_is_eos=True, add_bos=adds_bos).save_pretrained(tmp_path / "weak")
    weak = ModelConfig(
        model_name_or_path=str(tmp_path / "weak"),
        chat_template=str(tmp_path / "mine.jinja") if template == "file" else template,
    )
    encoder = encoder_for(weak, "annotator")
    if kind == "text":
        encoder.travel_as_text()
    pairs = [pair for pair in PAIRS if isinstance(pair[0], str) == (kind == "text")]
    rows = [encoder.encode(prompt, answers) for prompt, *answers in pairs]
    model = load_annotator_base(weak, encoder.tokenizer, seed=0)
    save(model, encoder.tokenizer, tmp_path / "fit")

    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "fit").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "fit")
    as_policy = encoder_for(weak, "policy")  # the way in which annotators have always been trained
    expected = []
    for row, (prompt, *answers) in zip(rows, pairs, strict=True):
        for ids, answer in zip(row.answers, answers, strict=True):
            wanted = stock_ids(tokenizer, prompt, answer)
            assert [*row.prompt, *ids] == wanted
            assert wanted[-1] == tokenizer.eos_token_id
            assert (wanted[0] == tokenizer.bos_token_id) == adds_bos
            alone = as_policy.encode(prompt, [answer])
            own = [*alone.prompt, *alone.answers[0]]  # a policy's BOS is its template's, or none
            assert own == (wanted if template == "plain" else wanted[adds_bos:])
        with torch.no_grad():
            expected.append([float(stock_score(stock, tokenizer, prompt, y)) for y in answers])
    for read_by in {"tokenizer", "plain" if template == "plain" else "tokenizer"}:
        given = ModelConfig(model_name_or_path=str(tmp_path / "fit"), chat_template=read_by)
        assert_scores(worker_scores(given, pairs, tmp_path), expected)


def test_what_fit_leaves_of_an_encoder_is_read_as_a_pair_of_texts(tmp_path: Path) -> None:
    weak = ModelConfig(model_name_or_path=str(pair_folder(tmp_path / "bert", "bert")))
    encoder = encoder_for(weak, "annotator")
    assert isinstance(encoder, PairEncoder)
    row = encoder.encode("Which?", ["This one.", "That"])
    stock = AutoTokenizer.from_pretrained(tmp_path / "bert")
    assert [*row.prompt, *row.answers[0]] == stock("Which?", "This one.").input_ids
    assert row.prompt == stock("Which?").input_ids


def test_real_transcripts_are_trained_on_and_read_alike(cwpo_data: Path, tmp_path: Path) -> None:
    """Multi-turn conversations of people, by a template that writes a newline behind its EOS."""
    import gzip
    import itertools
    import json

    from cwpo_dist.pairs.layout import Layout
    from cwpo_dist.pairs.parsing import parse

    layout = Layout({"chosen": "chosen", "rejected": "rejected"}, "hh", "conversational")
    with gzip.open(cwpo_data / "hh_harmless.jsonl.gz", "rt", encoding="utf-8") as lines:
        pairs = [parse(json.loads(line), layout) for line in itertools.islice(lines, 40)]
    for adds_bos in (True, False):
        save_tiny(tmp_path / "weak", "llama")
        tiny_tokenizer(pad_is_eos=True, add_bos=adds_bos).save_pretrained(tmp_path / "weak")
        weak = ModelConfig(model_name_or_path=str(tmp_path / "weak"))
        encoder = encoder_for(weak, "annotator")
        encoder.tokenizer.save_pretrained(tmp_path / "fit")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "fit")
        for pair in pairs:
            row = encoder.encode(pair.prompt, [pair.first, pair.second])
            for ids, answer in zip(row.answers, (pair.first, pair.second), strict=True):
                assert [*row.prompt, *ids] == stock_ids(tokenizer, pair.prompt, answer)


@pytest.mark.parametrize("pad", [None, -1, 1])
def test_the_token_that_is_read_follows_the_pad_token_of_the_configuration(
    pad: int | None, tmp_path: Path
) -> None:
    """Whatever the tokenizer pads with; 1 is EOS, in which this template ends."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("}}\n{% endfor", "}}{% endfor")
    save(tiny_classifier("llama", pad_token_id=pad), tokenizer, tmp_path)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = [
            [float(stock_score(stock, tokenizer, p, y)) for y in answers] for p, *answers in PAIRS
        ]
    settings = ModelConfig(model_name_or_path=str(tmp_path))
    assert_scores(worker_scores(settings, PAIRS, tmp_path), expected)


def test_a_classifier_that_looks_for_pads_itself_gets_those_that_it_knows(tmp_path: Path) -> None:
    """A decoder without a `score` head: its tokenizer's pads, EOS, are text to it."""
    tokenizer, sizes = tiny_tokenizer(pad_is_eos=True), {"hidden_size": 32, "intermediate_size": 64}
    save(tiny_classifier("modernbert-decoder", **sizes), tokenizer, tmp_path)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert stock.config.pad_token_id != tokenizer.pad_token_id
    with torch.no_grad():
        expected = [
            [float(stock_score(stock, tokenizer, p, y)) for y in answers] for p, *answers in PAIRS
        ]
    settings = ModelConfig(model_name_or_path=str(tmp_path))
    assert_scores(worker_scores(settings, PAIRS, tmp_path), expected)


@pytest.fixture(scope="module")
def tiny_forward() -> RowForward:
    """Any reward model: its pad token is 2, which no template writes."""
    model = tiny_classifier("llama", max_position_embeddings=8192)
    return RowForward(AnswerScores(model), 2, 8192, 16384)


@pytest.mark.parametrize("file", sorted(TEMPLATES.glob("*.jinja")), ids=lambda file: file.stem)
def test_scores_by_any_template_of_trls_are_those_of_the_stock_call(
    file: Path, tiny_forward: RowForward, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned(monkeypatch)  # what transformers takes for today
    tokenizer = tiny_tokenizer(add_bos=False)
    tokenizer.chat_template = file.read_text()
    encoder = RenderingEncoder(tokenizer, pad=2, template_date=DAY)
    rows, expected = [], []
    for prompt, *answers in PAIRS:
        (found,) = encoder.encode_all([Asked(prompt, answers)])
        faults = [row.fault for row in found if isinstance(row, TokenError)]
        if faults:
            assert None not in faults
            continue
        rows.append(encoder.encode(prompt, answers))
        model: Any = tiny_forward.module.model
        with torch.no_grad():
            expected.append(
                [float(stock_score(model, tokenizer, *parts(encoder, prompt, y))) for y in answers]
            )
    assert len(rows) >= 3
    assert_scores(tiny_forward(rows).values, expected)


def parts(encoder: RenderingEncoder, prompt: Text, answer: Text) -> tuple[Text, Text]:
    """Lists of parts for a template that reads no others: so its users write."""
    if not encoder.template.parts:
        return prompt, answer
    messages = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in conversation(prompt, answer)
    ]
    return messages[:-1], messages[-1:]


def test_a_pad_token_beyond_the_embeddings_fills_nothing(tmp_path: Path) -> None:
    """And a text that spells such a token is refused by name."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    save(tiny_classifier("llama"), tokenizer, tmp_path)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert tokenizer.pad_token_id == stock.config.vocab_size
    with torch.no_grad():
        expected = [
            [float(stock_score(stock, tokenizer, p, y)) for y in answers] for p, *answers in PAIRS
        ]
    settings = ModelConfig(model_name_or_path=str(tmp_path))
    assert_scores(worker_scores(settings, PAIRS, tmp_path), expected)
    encoder = encoder_for(settings, "reward model")
    with pytest.raises(TokenError, match=r"token '\[PAD\]' has id 266, but the model has 266"):
        encoder.encode("Q", ["x [PAD] y", "z"])


def test_plan_can_say_which_token_is_read(tmp_path: Path) -> None:
    said = {}
    for name in ("smollm2", "gemma", "deepseek", "llama3"):
        folder = family_folder(tmp_path / name, FAMILIES[name])
        settings = ModelConfig(model_name_or_path=str(folder))
        said[name] = (
            encoder_for(settings, "reward model")
            .reads()
            .removeprefix("reads the last token of its own rendering: ")
        )
    assert said == {
        "smollm2": r"'\n' after '<|im_end|>'",
        "gemma": r"'\n' after '<end_of_turn>'",
        "deepseek": "the answer's own; transformers passes over '<｜end▁of▁sentence｜>' behind it, "
        "the pad token",
        "llama3": "'<|eot_id|>'",
    }


def test_the_last_tokens_of_a_cut_answer_are_those_that_are_read(tmp_path: Path) -> None:
    folder = family_folder(tmp_path / "rm", FAMILIES["smollm2"])
    settings = ModelConfig(model_name_or_path=str(folder), max_length=60, over_length="truncate")
    encoder = encoder_for(settings, "reward model")
    long = [assistant("a long answer " * 9), assistant("another " * 9)]
    (row,) = encode_pairs(encoder, settings, [Asked([user("q" * 50)], [[each] for each in long])])
    assert isinstance(row, Row)
    assert row.n_longest <= 60
    assert all(encoder.tokenizer.decode(ids).endswith("<|im_end|>\n") for ids in row.answers)
