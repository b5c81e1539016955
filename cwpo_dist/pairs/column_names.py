"""The names that other people give their columns, by our fields: a new one is a line here."""

from __future__ import annotations

MEDIA = ("image", "images", "video", "videos", "audio", "audios", "pixel_values")

_AFTER = ("", "_response", "_answer", "_output", "_completion", "_text", "_message", "_messages")
CHOSEN = (
    *((f"chosen{end}", f"rejected{end}") for end in _AFTER),
    *((f"{start}_chosen", f"{start}_rejected") for start in ("response", "answer", "output")),
    *((f"preferred{end}", f"dispreferred{end}") for end in _AFTER),
    *((f"preferred{end}", f"non_preferred{end}") for end in _AFTER),
    ("better_response", "worse_response"),
    ("messages", "rejected_response"),  # ms-swift: the conversation ends in the chosen answer
    ("messages", "rejected_messages"),
)
_STEMS = ("response", "answer", "output", "completion", "conversation", "messages", "text")
EITHER = tuple(
    (f"{stem}{a}", f"{stem}{b}")
    for stem in _STEMS
    for a, b in (("_a", "_b"), ("_0", "_1"), ("_1", "_2"), ("0", "1"), ("1", "2"))
)
PROMPTS = ("instruction", "question", "query", "input", "user_input", "user_prompt")
CONVERSATIONS = ("messages", "conversations", "conversation", "conversation_input")
LISTS = (
    *("responses", "answers", "completions", "candidates", "generations", "outputs", "output"),
    *("choices", "replies", "samples", "summaries", "comparisons"),
)
IN_LISTS = (  # the text of an object in a list
    *("response", "answer", "completion", "candidate", "generation", "generated_text", "output"),
    *("text", "content", "reply", "summary", "message", "messages"),
)
ONE = IN_LISTS[:7]  # a response in a row of its own
RATINGS = {  # columns of their own, or keys of the objects in a list
    "scores": (
        *("scores", "score", "ratings", "rating", "rewards", "reward"),
        *("overall_score", "fine_grained_score"),
    ),
    "ranks": ("ranks", "rank"),
}
OTHERS: dict[str, tuple[str, ...]] = {
    "system": ("system_prompt", "system_message"),
    "tools": ("functions",),
    "label": (
        *("winner", "preference", "preferred", "preferred_response", "verdict"),
        *("better_response_id", "overall_preference", "human_preference"),
    ),
    "votes_chosen": ("chosen_votes",),
    "votes_rejected": ("rejected_votes",),
    "votes_tie": ("votes_equal", "votes_ties", "votes_neither", "tie_votes"),
}
