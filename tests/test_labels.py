"""Who decides: human labels are read for human arms alone, ties and missing scores are apart."""

from cwpo_dist.pairs.labels import Decision, Opinion, decide
from cwpo_dist.pairs.stored import Judgement

PAIRS = [
    Judgement("p", "b", "unlabelled"),
    Judgement("q", None, "unlabelled"),
    Judgement("r", "a", "labelled"),
    Judgement("s", "a", "test"),
    Judgement("t", "b", "unlabelled"),
    Judgement("v", None, "unlabelled"),
]
OPINIONS = {"p": Opinion(1.5), "q": Opinion(0.0), "s": Opinion(-1.0), "v": Opinion(-2.0, 0.5)}


def test_annotator_decides_by_score_and_never_reads_a_human_label() -> None:
    decided = decide(PAIRS, OPINIONS, "annotator", ["unlabelled"])
    assert decided == {
        "p": Decision("a", 1.5),
        "q": Decision("a", 0.0),
        "v": Decision("b", 2.0, 0.5),
    }
    flipped = [pair._replace(label="a" if pair.label == "b" else "b") for pair in PAIRS]
    assert decide(flipped, OPINIONS, "annotator", ["unlabelled"]) == decided


def test_human_decides_by_label_and_a_missing_label_takes_the_pair_out() -> None:
    assert decide(PAIRS, None, "human", ["unlabelled"]) == {
        "p": Decision("b", None),
        "t": Decision("b", None),
    }


def test_human_arm_keeps_to_pairs_that_the_annotator_could_read() -> None:
    splits = ["labelled", "unlabelled"]
    assert set(decide(PAIRS, OPINIONS, "human", splits)) == {"p", "r"}
