"""Chat templates: rendered as transformers renders them, on a date that stays, and ended at EOS."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
import trl
from tiny import CHAT_TEMPLATE, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cwpo_dist.lm.encoder import Asked, Encoder, load_tokenizer
from cwpo_dist.lm.ids import common_prefix, without_eos
from cwpo_dist.lm.reading import RenderingEncoder
from cwpo_dist.lm.rows import Row
from cwpo_dist.lm.templates import ChatTemplate, Fault, TokenError

TRL = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
DAY = date(2024, 7, 26)
BY_PARTS = ("idefics3", "llava_next", "smolvlm")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string", "description": "where"}},
                "required": ["place"],
            },
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Rome"}}}


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def one(role: str, content: str | None, **more: Any) -> list[dict[str, Any]]:
    return [said(role, content, **more)]


# prompt, two answers, tools
CONVERSATIONS: dict[str, tuple[Any, list[Any], Any]] = {
    "text": ("Where is it warm?", ["In Rome, I think.", "Nowhere at all."], None),
    "system": (
        [said("system", "Be brief, please."), said("user", "Where is it warm?")],
        [one("assistant", "In Rome."), one("assistant", "In Oslo.")],
        None,
    ),
    "turns": (
        [
            said("user", "Where is it warm?"),
            said("assistant", "In Rome."),
            said("user", "And in winter?"),
        ],
        [one("assistant", "There as well."), one("assistant", "In Cairo.")],
        None,
    ),
    "tools": (
        one("user", "Is it warm in Rome?"),
        [one("assistant", None, tool_calls=[CALL]), one("assistant", "I cannot know that.")],
        TOOLS,
    ),
    "reasoning": (
        one("user", "Is it warm in Rome?"),
        [
            one("assistant", "Yes, it is.", reasoning_content="It is July."),
            one("assistant", "No, it is not.", reasoning_content="It is January."),
        ],
        None,
    ),
    "spaces": (
        one("user", " \n Is it warm? \n"),
        [one("assistant", " Yes. \n\n"), one("assistant", "No.\t ")],
        None,
    ),
}


def pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock rendering happens on DAY: this is all that transformers asks for."""
    import transformers.utils.chat_template_utils as stock

    class Clock:
        @staticmethod
        def now() -> date:
            return DAY

    monkeypatch.setattr(stock, "datetime", Clock)
    stock._compile_jinja_template.cache_clear()


def stock(tokenizer: Any, name: str, prompt: Any, answer: Any, tools: Any) -> list[int] | None:
    """As a user calls transformers; None where the template refuses the conversation."""
    if isinstance(prompt, str):
        prompt, answer = one("user", prompt), one("assistant", answer)
    messages = [*prompt, *answer]
    if name.startswith(BY_PARTS):  # whose users write so
        messages = [
            {**m, "content": [{"type": "text", "text": m["content"]}]} if m["content"] else m
            for m in messages
        ]
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            messages, tools=tools, return_dict=False, date_string="26 Jul 2024"
        )
    except Exception:  # noqa: BLE001 (a template may raise anything)
        return None
    return ids


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("file", TRL, ids=lambda file: file.stem)
def test_tokens_are_those_of_apply_chat_template(
    file: Path, add_bos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a ready reward model the whole, of a policy all but what follows its last EOS.

    Whatever the tokenizer itself puts in front of a text.
    """
    pinned(monkeypatch)
    tokenizer = tiny_tokenizer(add_bos=add_bos)
    tokenizer.chat_template = file.read_text()
    ready = RenderingEncoder(tokenizer, pad=None)
    policy = Encoder(tokenizer)
    read = 0
    for prompt, answers, tools in CONVERSATIONS.values():
        wanted = [stock(tokenizer, file.stem, prompt, answer, tools) for answer in answers]
        for encoder in (ready, policy):
            (rows,) = encoder.encode_all([Asked(prompt, answers, tools)])
            read += not any(isinstance(row, TokenError) for row in rows)
            for row, whole in zip(rows, wanted, strict=True):
                if whole is None:
                    assert isinstance(row, TokenError)
                    assert row.fault is Fault.REFUSED
                    continue
                if isinstance(row, TokenError):  # what the template drops, said by name
                    assert row.fault is Fault.LEFT_OUT, row
                    continue
                expected = whole
                if encoder is policy:
                    text = without_eos(tokenizer.decode(whole), tokenizer.eos_token)
                    expected = tokenizer(text, add_special_tokens=False).input_ids
                    expected.append(tokenizer.eos_token_id)
                assert [*row.prompt, *row.answers[0]] == expected
    assert read >= 8, "most conversations can be rendered by any template"


@pytest.mark.parametrize("file", TRL, ids=lambda file: file.stem)
def test_an_annotators_template_ends_where_it_is_scored(file: Path) -> None:
    """It is one text, given to transformers alone: what it writes is cut and closed by EOS."""
    tokenizer = tiny_tokenizer(add_bos=True)
    tokenizer.chat_template = file.read_text()
    plain = ChatTemplate(tokenizer, "tokenizer", DAY)
    ended = RenderingEncoder(tokenizer, pad=2, trained=True, template_date=DAY).tokenizer
    for prompt, answers, tools in CONVERSATIONS.values():
        if isinstance(prompt, str):
            prompt, answers = one("user", prompt), [one("assistant", text) for text in answers]
        for answer in answers:
            try:
                text = plain.render([*prompt, *answer], tools, opens=False)
            except TokenError:
                continue
            handed = [plain._handed(message) for message in [*prompt, *answer]]
            found = ended.apply_chat_template(handed, tools=tools, tokenize=False)
            assert found == "<s>" + without_eos(text, "</s>").removeprefix("<s>") + "</s>"
            opening = ended.apply_chat_template(
                handed[: len(prompt)], tools=tools, tokenize=False, add_generation_prompt=True
            )
            assert opening == "<s>" + plain.render(prompt, tools, opens=True).removeprefix("<s>")


def of_text(template: str, choice: str = "tokenizer", **changes: Any) -> Encoder:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return Encoder(tokenizer, choice, **changes)


def test_whitespace_at_the_ends_of_a_template_stays_what_it_is() -> None:
    """Jinja drops one newline at the end, and spaces before a tag that begins a line."""
    starts = ("", "\n", "  ", "\n\n  ", "{# note #}\n")
    ends = ("", "\n", "\n\n", "\r\n", "  ", "\n  ", " {% if true %}x{% endif %}\n")
    for start in starts:
        for end in ends:
            tokenizer = tiny_tokenizer()
            tokenizer.chat_template = (
                start + "{% for m in messages %}<{{ m.content }}>\n{% endfor %}" + end
            )
            text = tokenizer.apply_chat_template(one("user", "Q"), tokenize=False)
            dated = "{% set now = strftime_now('%Y') %}" + tokenizer.chat_template
            ended = ChatTemplate(tokenizer, "tokenizer", DAY, ("<s>", "</s>")).finished
            found = tokenizer.apply_chat_template(
                one("user", "Q"), tokenize=False, chat_template=ended
            )
            assert found == f"<s>{text}</s>", (start, end)
            if start in ("", "{# note #}\n"):
                tokenizer.chat_template = dated
                rendered = ChatTemplate(tokenizer, "tokenizer", DAY).render(
                    one("user", "Q"), opens=False
                )
                assert rendered == tokenizer.apply_chat_template(one("user", "Q"), tokenize=False)


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("{{ strftime_now('%d %B %Y, %A; %j') }}|", "26 July 2024, Friday; 208"),
        ("{{ strftime_now('%-d.%-m.%y') }}|", "26.7.24"),
        ("{{ date_string }}|", "26 Jul 2024"),
        (
            "{% if not date_string is defined %}{% set date_string = strftime_now('%Y') %}"
            "{% endif %}{{ date_string }}|",
            "26 Jul 2024",
        ),
        ("{% macro m() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ m() }}|", "2024-07-26"),
    ],
)
def test_the_date_is_the_one_that_is_set(template: str, shown: str) -> None:
    turns = "{% for m in messages %}{{ m.content }}{% endfor %}"
    encoder = of_text(template + turns)
    assert encoder.template.prints_date
    row = encoder.encode("Q", ["A"])
    assert encoder.tokenizer.decode(row.prompt) == f"{shown}|Q"
    later = of_text(template + turns, template_date=date(2031, 1, 2))
    assert later.encode("Q", ["A"]) != row
    assert not of_text(turns).template.prints_date
    # a policy's own template travels as it was given: tomorrow it prints tomorrow's date
    assert encoder.tokenizer.chat_template == template + turns


def test_an_annotators_date_travels_with_it(tmp_path: Path) -> None:
    """Also where a ready model is told another date: it was trained on this one."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ date_string }} {{ strftime_now('%Y') }}" + CHAT_TEMPLATE
    trained = RenderingEncoder(tokenizer, pad=2, trained=True, template_date=DAY)
    trained.tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    stock = again.apply_chat_template(one("user", "Q"), tokenize=False)
    assert stock == "<s>26 Jul 2024 2024<|user|>\nQ</s>"
    told = RenderingEncoder(again, pad=2, template_date=date(2031, 1, 2))
    assert told.encode("Q", ["A", "B"]) == trained.encode("Q", ["A", "B"])
    assert not told.template.prints_date


def test_of_named_templates_the_default_is_taken_and_tools_have_their_own(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    named = {"default": CHAT_TEMPLATE, "tool_use": "tools:" + CHAT_TEMPLATE}
    tokenizer.chat_template = named
    encoder = Encoder(tokenizer)
    assert encoder.encode("Q", ["A"]) == of_text(CHAT_TEMPLATE).encode("Q", ["A"])
    with_tools = encoder.encode(one("user", "Q"), [one("assistant", "A")], TOOLS)
    assert encoder.tokenizer.decode(with_tools.prompt).startswith("tools:<|user|>")
    encoder.tokenizer.save_pretrained(tmp_path / "policy")
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").chat_template == named
    # an annotator's end at EOS, each of them
    trained = RenderingEncoder(tiny_tokenizer(), pad=2, trained=True)
    assert isinstance(trained.tokenizer.chat_template, str)
    tokenizer.chat_template = named
    both = RenderingEncoder(tokenizer, pad=2, trained=True).tokenizer
    both.save_pretrained(tmp_path / "annotator")
    again = AutoTokenizer.from_pretrained(tmp_path / "annotator")
    for tools in (None, TOOLS):
        text = again.apply_chat_template(one("user", "Q"), tools=tools, tokenize=False)
        assert text.endswith("Q</s>")
    tokenizer.chat_template = {"rag": CHAT_TEMPLATE}
    with pytest.raises(TokenError, match=r"of its templates \(rag\) none is named 'default'"):
        Encoder(tokenizer)


PARTS = (
    "{% for m in messages %}{{ m.role }}: {% for part in m.content %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
)
USERS_PARTS = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'user' %}"
    "{% for part in m.content %}{{ part['text'] }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "roles"),
    [
        (PARTS, {"system", "user", "assistant"}),
        (USERS_PARTS, {"user"}),
        (PARTS.replace("part['type']", "part['type'] + ''"), {"system", "user", "assistant"}),
        (CHAT_TEMPLATE, set()),
    ],
)
def test_a_template_that_reads_only_lists_of_parts_is_given_them(
    template: str, roles: set[str]
) -> None:
    encoder = of_text(template)
    assert encoder.template.parts == roles
    prompt = [said("system", "Be kind."), said("user", "Why?")]
    row = encoder.encode(prompt, [one("assistant", "So."), one("assistant", "Just so.")])
    assert encoder.tokenizer.decode(row.prompt).count("Be kind.") == 1
    texts = [encoder.tokenizer.decode([*row.prompt, *ids]) for ids in row.answers]
    assert all("Why?" in text for text in texts)
    assert "Just so." in texts[1]


DROPS = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}."


@pytest.mark.parametrize(
    ("template", "prompt", "answers", "what"),
    [
        (DROPS, "Why?", ["So.", "Not at all."], "answer"),
        (DROPS.replace("user", "assistant"), "Why?", ["So.", "Not at all."], "prompt"),
        # reasoning is cut, and nothing stands behind it
        (
            CHAT_TEMPLATE.replace(
                "message['content']", "message['content'].split('</think>') | last | trim"
            ),
            "Why?",
            ["<think>\nSo.\n</think>\n\n", "Not at all."],
            "answer",
        ),
    ],
)
def test_what_a_template_leaves_out_is_a_fault_of_the_answer(
    template: str, prompt: str, answers: list[str], what: str
) -> None:
    for encoder in (of_text(template), RenderingEncoder(of_text(template).tokenizer, pad=None)):
        (found,) = encoder.encode_all([Asked(prompt, answers)])
        faults = [row for row in found if isinstance(row, TokenError)]
        assert len(faults) == 2 or (faults and what == "answer")
        for fault in faults:
            assert fault.fault is Fault.LEFT_OUT
            assert str(fault).startswith(f"{what}: the chat template leaves nothing of its text")


def test_a_role_that_a_template_drops_is_told() -> None:
    encoder = of_text(
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}\n{% endif %}{% endfor %}"
    )
    prompt = [said("system", "Be kind and always brief."), said("user", "Why?")]
    assert encoder.left_out(prompt, one("assistant", "So.")) == {"system"}
    assert encoder.left_out(prompt[1:], one("assistant", "So.")) == set()
    assert encoder.left_out("Why?", "So.") == set()


def test_what_is_no_jinja_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "broken.jinja"
    path.write_text("{% for m in messages %}\n{{ m.content }")
    with pytest.raises(TokenError, match=r"chat_template: .*broken\.jinja.* line 2"):
        Encoder(tiny_tokenizer(), str(path))


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ 'a' + messages }}", "{{ none.x.y }}"])
def test_whatever_a_template_raises_refuses_the_answers(template: str) -> None:
    (found,) = of_text(template).encode_all([Asked("Q", ["A", "B"])])
    assert len(found) == 2
    for refusal in found:
        assert isinstance(refusal, TokenError)
        assert refusal.fault is Fault.REFUSED


def test_messages_are_handed_over_with_every_key() -> None:
    encoder = of_text(
        "{% for m in messages %}{{ m.name }}/{{ m.role }}: {{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}|{% endfor %}"
    )
    prompt = [said("user", "Warm?", name="Eve", tool_call_id=None)]
    row = encoder.encode(prompt, [one("assistant", None, tool_calls=[CALL]), one("assistant", "?")])
    assert isinstance(row, Row)
    text = encoder.tokenizer.decode([*row.prompt, *row.answers[0]])
    assert text == "Eve/user: Warm?|/assistant: weather|</s>"


def test_a_common_prefix() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4], [1, 2]]) == 2
    assert common_prefix([[1], [2]]) == 0


def test_plain_conversations_of_a_tokenizer_that_puts_a_space_at_the_start_of_a_text(
    tmp_path: Path,
) -> None:
    """Llama 2's and Mistral's: behind BOS there is none, and the saved template writes BOS."""
    tokens = Tokenizer(models.BPE(unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"])
    tokens.train_from_iterator(["\n\nHuman: why is that\n\nAssistant: so it is"], trainer)
    bos = ("<s>", tokens.token_to_id("<s>"))
    tokens.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "given")
    encoder = Encoder(load_tokenizer(tmp_path / "given"), "plain")
    prompt, answer = [{"role": "user", "content": "why"}], [{"role": "assistant", "content": "so"}]
    row = encoder.encode(prompt, [answer])
    encoder.tokenizer.save_pretrained(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    own = saved.apply_chat_template([*prompt, *answer], return_dict=False)
    assert [*row.prompt, *row.answers[0]] == [*own, saved.eos_token_id]
    joined = encoder.encode("why", [" so"])
    assert joined.prompt == saved("why")["input_ids"]
