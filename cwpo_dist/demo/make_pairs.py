"""Takes the demo model and the prompt list, writes pairs of sampled answers with SIMULATED labels.

The two answers of a pair are real samples of the demo model.  The labels are not human: a label
is drawn from the Bradley-Terry probability of the gold rule (see ``gold``), so some labels
contradict the rule, as they would with people.  A label depends on the seed and its own row alone,
so labels can be drawn again without the model and whatever the order of the rows; the answers
themselves may differ under another version of torch, which is why the result is committed.

Usage: ``python -m cwpo_dist.demo.make_pairs --model FOLDER --out pairs.jsonl``
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from cwpo_dist.demo import gold

PROMPTS = Path(__file__).with_name("prompts.txt")
SEED = 20240917
PAIRS_PER_PROMPT = 4
# Two answers more than the pairs need: empty and repeated ones are dropped.
ANSWERS_PER_PROMPT = 2 * PAIRS_PER_PROMPT + 2
PROMPTS_PER_BATCH = 4
MAX_NEW_TOKENS = 48
TEMPERATURE = 1.0
TOP_P = 0.95
MIN_WORDS = 6

# A letter or a closing sign must come before the full stop: "1." opens a list item.
_SENTENCE_END = re.compile(r"[^\W\d_][\])\"'’”*]*[.!?][\])\"'’”*]*(?=\s|$)")
# Broken characters, and matters that a small model should not be quoted on in an example file.
_UNFIT = re.compile(
    r"\ufffd|\b(?:abus|allah|bible|christian|islam|jesus|muslim|suicid)", re.IGNORECASE
)


class AnswerPair(NamedTuple):
    """Two answers to one prompt; the fields are the keys of a row."""

    prompt: str
    response_a: str
    response_b: str


def read_prompts(path: Path = PROMPTS) -> list[str]:
    """Reads the prompt list.

    Args:
        path: a text file with one prompt per line.

    Returns:
        The prompts in file order, without empty lines.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


def trim(text: str, finished: bool) -> str:
    """Cuts an answer that ran into the token limit, so that it reads as a whole.

    Args:
        text: the decoded answer.
        finished: whether the model itself ended the answer.

    Returns:
        The answer up to its last full sentence, or up to its last full word if that would leave
        too little.
    """
    text = text.strip()
    if finished:
        return text
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    if ends and len(text[: ends[-1]].split()) >= MIN_WORDS:
        return text[: ends[-1]]
    # The last word may be half a word, so it goes.
    return text.rpartition(" ")[0].rstrip(" \n,;:-")


def pair_up(prompt: str, answers: Sequence[str], limit: int = PAIRS_PER_PROMPT) -> list[AnswerPair]:
    """Forms disjoint pairs of distinct answers and drops pairs unfit for an example file.

    Args:
        prompt: the prompt that all answers belong to.
        answers: sampled answers, in any state.
        limit: the most pairs to form.

    Returns:
        Pairs, without a label; no answer is used twice.
    """
    usable = list(dict.fromkeys(answer for answer in answers if len(answer.split()) >= MIN_WORDS))
    pairs = list(zip(usable[0::2], usable[1::2], strict=False))[:limit]
    return [
        AnswerPair(prompt, a, b) for a, b in pairs if not (_UNFIT.search(a) or _UNFIT.search(b))
    ]


def draw_label(pair: AnswerPair, seed: int = SEED) -> str:
    """Draws the simulated label of one pair.

    Args:
        pair: the pair.
        seed: the seed of the noise.

    Returns:
        "a" with the Bradley-Terry probability of the gold rule, else "b".
    """
    luck = random.Random("\n".join((str(seed), *pair))).random()
    return "a" if luck < gold.probability(*pair) else "b"


def _sample(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[list[str]]:
    """Samples the answers to a few prompts in one batch, one list per prompt."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode():
        output = model.generate(
            **batch,
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            top_k=0,
            max_new_tokens=MAX_NEW_TOKENS,
            num_return_sequences=ANSWERS_PER_PROMPT,
        )
    assert isinstance(output, torch.Tensor), "no dict of outputs is asked for"
    fresh = output[:, batch["input_ids"].shape[1] :]
    written = tokenizer.batch_decode(fresh, skip_special_tokens=True)
    ended = [tokenizer.eos_token_id in row for row in fresh]
    answers = list(map(trim, written, ended))
    size = ANSWERS_PER_PROMPT
    return [answers[start : start + size] for start in range(0, len(answers), size)]


def _batches(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Yields consecutive slices of at most the given size."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def make(model_folder: Path, prompts: Sequence[str], seed: int = SEED) -> list[dict[str, str]]:
    """Samples answers, pairs them and labels the pairs.

    Args:
        model_folder: a folder as written by ``cwpo_dist.demo.model``.
        prompts: the prompts to answer.
        seed: the seed of sampling and of the label noise.

    Returns:
        Rows with ``prompt``, ``response_a``, ``response_b`` and ``label``.
    """
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    pairs: list[AnswerPair] = []
    for batch in _batches(prompts, PROMPTS_PER_BATCH):
        for prompt, answers in zip(batch, _sample(model, tokenizer, batch), strict=True):
            pairs.extend(pair_up(prompt, answers))
        print(f"{len(pairs)} pairs", file=sys.stderr, flush=True)
    return [{**pair._asdict(), "label": draw_label(pair, seed)} for pair in pairs]


def write(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Writes rows as JSON lines.

    Args:
        rows: what to write.
        path: the file to write or replace.
    """
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Make the demo's preference pairs.")
    parser.add_argument("--model", type=Path, required=True, help="model folder to sample from")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines to write")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of samples and label noise")
    options = parser.parse_args()
    # One thread: sums in another order would round differently and sample other answers.
    torch.set_num_threads(1)
    write(make(options.model, read_prompts(), options.seed), options.out)


if __name__ == "__main__":
    main()
