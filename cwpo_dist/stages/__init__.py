"""One file a stage, each with its record `STAGE`; the one list of them, in their order.

Nothing is imported here: what a stage needs is heavy, and the command line wants names alone.
"""

# Each stage and what it does, for people. `cwpo <stage>` exists for those of which something is
# said; the others are steps on the way.
LISTED: dict[str, str] = {
    "prepare": "Read the sources, split them, set bad rows aside: pairs and rejects.",
    "fit": "Train the weak model on the labelled pairs: the annotator.",
    "annotate": "Score every pair with the annotator or any one-label reward model.",
    "implicit": "",
    "weigh": "Scores to preferences: who won, how confidently, with what weight.",
    "tokens": "",
    "sft": "Fine-tune the policy on the chosen answers.",
    "reference": "The SFT policy's log-probabilities of both answers, once.",
    "align": "Confidence-weighted preference optimisation of the policy.",
    "generate": "",
    "evaluate": "Held-out accuracy, calibration and gold reward accuracy.",
}
