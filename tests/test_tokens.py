"""Tokens: one conversation, one BOS, one EOS, and a prompt that really is what answers share."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from tiny import CHAT_TEMPLATE, tiny_tokenizer
from transformers import AutoTokenizer

from cwpo_dist.config import TEMPLATE_DATE, ModelConfig
from cwpo_dist.lm.encoder import Asked, Encoder, TokenError, load_tokenizer
from cwpo_dist.lm.fitting import encode_answers, encode_pairs, fit_length
from cwpo_dist.lm.rows import CutRow, Row
from cwpo_dist.lm.templates import Fault

BOS, EOS = 0, 1
quick = settings(max_examples=80)
# Anything a file can hold, with what makes borders hard: spaces, newlines, colons, shared starts.
text = st.text(max_size=30) | st.text(alphabet="the: \n", max_size=12)
prompts = text.filter(bool)
plain = Encoder(tiny_tokenizer(), "plain")
plain_without_bos = Encoder(tiny_tokenizer(add_bos=False), "plain")
chat = Encoder(tiny_tokenizer(), "tokenizer")


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def assistant(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


@given(prompts, text, text)
@quick
def test_plain_text_survives_the_round_trip(prompt, first, second):
    row = plain.encode(prompt, [first, second])
    for answer, ids in zip([first, second], row.answers, strict=True):
        assert plain.tokenizer.decode([*row.prompt[1:], *ids[:-1]]) == prompt + answer


@given(prompts, text, text)
@quick
def test_each_conversation_has_the_tokens_of_the_stock_tokenizer(prompt, first, second):
    """No border is re-tokenised, though merges of colon + space or of two newlines straddle it."""
    row = plain.encode(prompt, [first, second])
    for answer, ids in zip([first, second], row.answers, strict=True):
        assert [*row.prompt, *ids] == [*plain.tokenizer(prompt + answer).input_ids, EOS]


@given(prompts, text, text)
@quick
def test_one_bos_and_one_eos_an_answer(prompt, first, second):
    for encoder in (plain, chat):
        row = encoder.encode(prompt, [first, second])
        opening = [BOS] if encoder is plain else []  # the chat template writes none
        assert [each for each in row.prompt if each == BOS] == row.prompt[: len(opening)] == opening
        for ids in row.answers:
            assert BOS not in ids
            assert ids[-1] == EOS
            assert ids.count(EOS) == 1


@given(prompts, text, text)
@quick
def test_prompt_is_the_longest_prefix_of_all_three(prompt, first, second):
    row = plain.encode(prompt, [first, second])
    opening = plain.tokenizer(prompt).input_ids
    full = [plain.tokenizer(prompt + answer).input_ids for answer in (first, second)]
    n = len(row.prompt)
    assert all(ids[:n] == row.prompt for ids in [opening, *full])
    following = {tuple(ids[n : n + 1]) for ids in [opening, *full]}
    assert len(following) > 1 or n == len(opening)


def test_a_merge_across_the_border_goes_to_the_answers():
    row = plain.encode("Q:", [" the cat", "no"])
    decode = plain.tokenizer.decode
    assert decode(row.prompt) == "<s>Q"
    assert [decode(ids) for ids in row.answers] == [": the cat</s>", ":no</s>"]


@given(prompts, text)
@quick
def test_without_bos_where_the_tokenizer_writes_none(prompt, answer):
    tokenizer = plain_without_bos.tokenizer
    # else a merge across the border takes the whole prompt: refused, see below
    assume(tokenizer(prompt).input_ids[0] == tokenizer(prompt + answer).input_ids[0])
    row = plain_without_bos.encode(prompt, [answer])
    assert plain_without_bos.bos_id is None
    assert [*row.prompt, *row.answers[0]] == [*tokenizer(prompt + answer).input_ids, EOS]


def test_a_prompt_without_tokens_of_its_own_is_refused():
    with pytest.raises(TokenError, match="prompt: ''"):
        plain_without_bos.encode("", ["answer"])
    with pytest.raises(TokenError, match="prompt: ':'"):
        plain_without_bos.encode(":", [" straddles"])
    with pytest.raises(TokenError, match="prompt: ' t'"):
        plain_without_bos.encode(" t", ["he"])


@given(prompts, text, text)
@quick
def test_text_and_messages_give_the_same_chat(prompt, first, second):
    as_text = chat.encode(prompt, [first, second])
    as_messages = chat.encode(user(prompt), [assistant(first), assistant(second)])
    assert as_text == as_messages


@pytest.fixture
def chat_folder() -> str | None:
    """SmolLM2's own tokenizer and template where there is one, else the tiny one."""
    for name in ("CWPO_MODEL", "CWPO_SMOLLM2"):
        folder = os.environ.get(name)
        if folder and (Path(folder) / "tokenizer.json").is_file():
            return folder
    return None


def test_chat_equals_the_stock_template_less_what_follows_eos(chat_folder):
    tokenizer = load_tokenizer(chat_folder) if chat_folder else tiny_tokenizer(add_bos=False)
    encoder = Encoder(tokenizer, "tokenizer")
    history = [*user("What is 2 + 2?"), *assistant("4."), *user("And\n\nhalf of that?")]
    answers = [assistant("2, of course."), assistant(" It is:\n\ntwo ")]
    row = encoder.encode(history, answers)
    stock = [
        tokenizer.apply_chat_template([*history, *answer], return_dict=False) for answer in answers
    ]
    opening = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=False)
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    assert row.prompt == opening
    for ids, expected in zip(row.answers, stock, strict=True):
        assert ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1
        assert [*row.prompt, *ids, *newline] == expected


def test_plain_conversation_is_an_hh_transcript():
    messages = [
        {"role": "system", "content": "Be kind."},
        *user("Hi"),
        *assistant("Hello"),
        *user("x"),
    ]
    row = plain.encode(messages, [assistant("Yes."), assistant("No.")])
    decode = plain.tokenizer.decode
    transcript = (
        "<s>\n\nSystem: Be kind.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: x\n\nAssistant: "
    )
    assert decode([*row.prompt, *row.answers[0]]) == transcript + "Yes.</s>"
    assert decode([*row.prompt, *row.answers[1]]) == transcript + "No.</s>"


def test_an_answer_that_brings_its_own_eos_gets_no_second():
    row = plain.encode("Q ", ["yes</s>", "no </s>\n", "a</s>b"])
    assert [ids.count(EOS) for ids in row.answers] == [1, 1, 2]
    assert plain.tokenizer.decode(row.answers[2]) == "a</s>b</s>"


def test_template_file_travels_with_the_saved_tokenizer(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}")
    encoder = Encoder(tiny_tokenizer(), str(path))
    encoder.tokenizer.save_pretrained(tmp_path / "saved")
    again = Encoder(load_tokenizer(tmp_path / "saved"), "tokenizer")
    assert again.tokenizer.chat_template == path.read_text()
    assert again.encode("hi", ["yo", "ya"]) == encoder.encode("hi", ["yo", "ya"])
    decoded = again.tokenizer.decode(again.encode("hi", ["yo"]).prompt)
    assert decoded == "[user] hi"


def without_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def test_missing_templates_are_refused_with_a_remedy(tmp_path):
    with pytest.raises(TokenError, match=r"chat_template: 'tokenizer'.*use 'plain'"):
        Encoder(without_template(), "tokenizer")
    with pytest.raises(TokenError, match=r"chat_template: cannot read .*missing\.jinja"):
        Encoder(without_template(), str(tmp_path / "missing.jinja"))


def test_what_a_template_refuses_is_a_fault_of_the_row(tmp_path):
    path = tmp_path / "strict.jinja"
    path.write_text(
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    )
    with pytest.raises(TokenError, match="refused roles assistant, assistant: user first"):
        Encoder(tiny_tokenizer(), str(path)).encode(assistant("hi"), [assistant("x")])
    with pytest.raises(TokenError, match="use one kind"):
        plain.encode("text", [assistant("hi")])


def test_distinct_pad(tmp_path):
    tiny_tokenizer(pad_is_eos=True).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token_id == EOS
    annotators = load_tokenizer(tmp_path, distinct_pad=True)
    assert annotators.pad_token == "<|pad|>"
    assert annotators.pad_token_id == 266
    annotators.save_pretrained(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again", distinct_pad=True)
    assert (again.pad_token_id, len(again)) == (266, 267)
    tiny_tokenizer().save_pretrained(tmp_path / "own")
    assert load_tokenizer(tmp_path / "own", distinct_pad=True).pad_token == "<pad>"


@pytest.mark.parametrize("said_in", ["tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_saved_tokenizer_pads_on_the_side_on_which_it_did(side, said_in, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / said_in
    settings = json.loads(file.read_text())
    if said_in == "tokenizer.json":
        settings["padding"] = {
            **{"strategy": "BatchLongest", "direction": side.capitalize()},
            **{"pad_to_multiple_of": None, "pad_id": 2, "pad_type_id": 0, "pad_token": "<pad>"},
        }
    else:
        settings["padding_side"] = side
    file.write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == side
    encoder = Encoder(load_tokenizer(tmp_path))
    encoder.encode("a prompt", ["one", "another"])
    encoder.tokenizer.save_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").padding_side == side


def test_pairs_that_became_equal_or_too_long_have_their_faults():
    path = "{% for m in messages %}{{ m['content'] | trim }}|{% endfor %}"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = path
    encoder, model = Encoder(tokenizer), ModelConfig(model_name_or_path="m", max_length=12)
    answers = [("yes", " yes\n"), ("yes", "no"), ("a long answer", "no")]
    pairs = [Asked("Q", each) for each in answers]
    same, read, long = encode_pairs(encoder, model, pairs)
    assert same.fault is Fault.IDENTICAL
    assert isinstance(read, Row)
    assert long.fault is Fault.OVER_LENGTH
    # by themselves both answers can be read, and one of them where the other is too long
    alone = encode_answers(encoder, model, pairs)
    assert [[isinstance(row, Row) for row in rows] for rows in alone] == [
        [True, True],
        [True, True],
        [False, True],
    ]


def test_a_pair_that_differs_only_beyond_the_cut_is_dropped():
    encoder = Encoder(tiny_tokenizer(), "plain")
    model = ModelConfig(model_name_or_path="m", max_length=16, over_length="truncate")
    pair = Asked("Q", ("ab" * 40 + " one", "ab" * 40 + " two"))
    (row,) = encode_pairs(encoder, model, [pair])
    assert row.fault is Fault.OVER_LENGTH


ids = st.lists(st.integers(3, 60), min_size=1, max_size=40)
answers = st.lists(st.integers(3, 60), max_size=40).map(lambda found: [*found, EOS])
long_rows = st.builds(lambda p, a: Row([BOS, *p], (a,)), ids, answers)


@given(long_rows, st.integers(4, 90))
@quick
def test_truncation_keeps_bos_eos_and_something_of_each_answer(row, max_length):
    cut = fit_length(row, max_length, "truncate")
    if row.n_longest <= max_length:
        assert cut is row
        return
    assert cut.n_longest <= max_length
    assert cut.prompt[0] == BOS
    assert len(cut.prompt) >= min(len(row.prompt), max_length // 4)
    assert row.prompt[len(row.prompt) - len(cut.prompt) + 1 :] == cut.prompt[1:]
    for before, after in zip(row.answers, cut.answers, strict=True):
        assert after[-1] == EOS
        assert len(after) >= min(2, len(before))
        assert before[: len(after) - 1] == after[:-1]


def test_truncation_worked_by_hand():
    row = Row([BOS, 3, 4, 5, 6, 7, 8, 9], ([12, 13, 14, 15, 16, 17, EOS],))
    # the prompt gives way first, its oldest tokens before its newest, but for the first of all
    assert fit_length(row, 12, "truncate") == CutRow([BOS, 6, 7, 8, 9], row.answers)
    # down to a quarter of the length; then the answer loses its end, and EOS stays
    cut = fit_length(row, 8, "truncate")
    assert cut == CutRow([BOS, 9], ([12, 13, 14, 15, 16, EOS],))
    # a short answer to the same prompt leaves it more room
    short = Row(row.prompt, ([10, 11, EOS],))
    assert fit_length(short, 8, "truncate") == CutRow([BOS, 6, 7, 8, 9], short.answers)


@given(long_rows, st.integers(1, 90))
@quick
def test_drop_is_all_or_nothing(row, max_length):
    kept = fit_length(row, max_length, "drop")
    assert kept is (row if row.n_longest <= max_length else None)


def test_no_room_to_truncate_to_is_refused():
    with pytest.raises(TokenError, match="max_length: 3 leaves no room"):
        fit_length(Row([BOS, 3, 4], ([5, EOS],)), 3, "truncate")


def test_tiny_template_is_like_smollm2s():
    assert tiny_tokenizer().chat_template == CHAT_TEMPLATE
    assert chat.tokenizer.apply_chat_template(user("a"), tokenize=False) == "<|user|>\na</s>\n"


def test_many_pairs_at_once_are_the_same_pairs_one_by_one():
    encoder = Encoder(tiny_tokenizer(), "plain")
    good = [Asked("Question: ", ("a longer answer", "the")), Asked("Q", ("x", "y and z"))]
    bad = ("", [{"role": "assistant", "content": "a message"}])
    found = encoder.encode_all([good[0], Asked("mixed", bad), good[1]])
    assert [found[0], found[2]] == [
        [encoder.encode(prompt, [answer]) for answer in answers] for prompt, answers, _ in good
    ]
    assert [isinstance(row, TokenError) for row in found[1]] == [False, True]
    assert encoder.encode_all([]) == []


TOOL = {"type": "function", "function": {"name": "stops", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "stops", "arguments": {"near": "Zoo"}}}
TOOL_TALK = [
    {"role": "system", "content": "You know the trams."},
    {"role": "user", "content": "Which stop is near?", "name": "Ada"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Ask."},
    {"role": "tool", "content": "Zoo Gate", "name": "stops", "tool_call_id": "1"},
]
STOCK = Path(find_spec("trl").submodule_search_locations[0] if find_spec("trl") else "")
TEMPLATES = sorted(path.name for path in (STOCK / "chat_templates").glob("*[!_training].jinja"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_tools_calls_and_reasoning_are_rendered_as_the_stock_template_does(name):
    encoder = Encoder(tiny_tokenizer(add_bos=False), str(STOCK / "chat_templates" / name))
    answers = [
        [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
        [{"role": "assistant", "content": "Zoo Gate.", "reasoning_content": "It says so."}],
    ]
    for answer in answers:
        talk = [*TOOL_TALK, *answer]
        try:
            stock = encoder.tokenizer.apply_chat_template(
                talk, tools=[TOOL], return_dict=False, date_string=f"{TEMPLATE_DATE:%d %b %Y}"
            )
        except (TemplateError, TypeError, ValueError):
            with pytest.raises(TokenError, match="the chat template refused"):
                encoder.encode(TOOL_TALK, [answer], [TOOL])
            continue
        row = encoder.encode(TOOL_TALK, [answer], [TOOL])
        ours = [*row.prompt, *row.answers[0][:-1]]  # less the EOS that is ours
        assert ours == stock[: len(ours)]
        assert len(stock) - len(ours) < 30  # what the template writes behind an answer


@pytest.mark.skipif(not TEMPLATES, reason="trl is not installed")
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "glm4moe"])
def test_tools_and_earlier_calls_reach_the_prompt(name):
    encoder = Encoder(tiny_tokenizer(add_bos=False), str(STOCK / f"chat_templates/{name}.jinja"))
    row = encoder.encode(TOOL_TALK, [assistant("Zoo Gate.")], [TOOL])
    text = encoder.tokenizer.decode(row.prompt)
    assert text.count("stops") >= 2  # the tool, and the call of it
    assert "Zoo Gate" in text
    assert "None" not in text


def test_the_plain_template_writes_calls_and_no_null():
    call = [{"role": "assistant", "content": None, "tool_calls": [CALL]}]
    row = plain.encode(user("Which stop?"), [call, assistant("Zoo")], [TOOL])
    text = plain.tokenizer.decode([*row.prompt, *row.answers[0]])
    assert "None" not in text
    assert text.startswith(f"<s>\n\nTools: {json.dumps([TOOL])}\n\nHuman: Which stop?")
    assert json.dumps([CALL]) in text


def test_a_template_that_cannot_add_a_null_refuses_the_pair(tmp_path):
    path = tmp_path / "adds.jinja"
    path.write_text("{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}")
    encoder = Encoder(tiny_tokenizer(), str(path))
    with pytest.raises(TokenError, match="the chat template refused roles user, assistant"):
        encoder.encode(user("x"), [[{"role": "assistant", "content": None, "tool_calls": [CALL]}]])
