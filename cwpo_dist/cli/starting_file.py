"""The command `init`: five answers in, a configuration to begin with, comments in it, out."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
import yaml

from cwpo_dist.config import ConfigError

Labels = Literal["some", "all", "none"]

_HEAD = """\
# A run of cwpo_dist.
#   cwpo plan {name} --show 3    checks it, says what it costs, shows rows as the models see them
#   cwpo {command} {name}   does what is not done yet; the same command goes on after a kill
#   cwpo config --explain NAME   says what a field is; `cwpo config {name}` shows all of them
output_dir: {output_dir}   # or a URI that all nodes see: s3://bucket/run
"""
_PREPARE = """\
prepare:
  sources:
    - path: {data}   # a file, glob, folder, URI or hub id
  labelled_fraction: {fraction}   # {why}
  test_fraction: {test}   # of prompts, held out for the figures
"""
_ARMS: dict[Labels, str] = {
    "some": "[weak, cw, semi]   # labels of the annotator: as they are, weighted, beside people's",
    "all": "[human, weak, cw]   # labels of people; of the annotator; these by its confidence",
    "none": "[weak, cw]   # the annotator's labels, as they are and weighted by its confidence",
}
_FRACTION: dict[Labels, tuple[float, str]] = {
    "some": (1.0, "all labels that there are; rows without one get the annotator's"),
    "all": (0.3, "of training prompts: the other labels are hidden, to compare arms"),
    "none": (0.0, "there are no labels"),
}


@dataclass(frozen=True)
class Answers:
    """What a starting file is made of.

    Attributes:
        data: where the pairs are.
        labels: whether some, all or none of them have a label of people.
        annotator: the weak model that is trained, or with no labels a ready reward model.
        policy: the model to align; "": none, the run ends with scores.
        gpus: of the cluster; 0: everything on CPUs.
        output_dir: the run directory.
    """

    data: str
    labels: Labels
    annotator: str
    policy: str
    gpus: int
    output_dir: str


def starting_file(answers: Answers, name: str) -> str:
    """The text of a configuration, whose place is `name` as a shell takes it."""
    fraction, why = _FRACTION[answers.labels]
    test = 0.1 if answers.policy else 0.0
    return "".join(
        [
            _HEAD.format(
                name=name,
                command="run" if answers.policy else "annotate",
                output_dir=_spelled(answers.output_dir),
            ),
            f"arms: {_ARMS[answers.labels]}\n" if answers.policy else "",
            _PREPARE.format(data=_spelled(answers.data), fraction=fraction, why=why, test=test),
            _annotator(answers),
            _of_policy(answers) if answers.policy else "",
        ]
    )


def _annotator(answers: Answers) -> str:
    model = f"model_name_or_path: {_spelled(answers.annotator)}"
    if answers.labels == "none":
        ready = f"  model:   # a ready reward model\n    {model}\n    max_length: 1024\n"
        return f"annotate:\n{ready}{_pool(answers)}"
    weak = f"weak:   # becomes the annotator\n  {model}\n"
    return f"{weak}fit:\n{_workers(answers)}annotate:\n{_pool(answers)}"


def _of_policy(answers: Answers) -> str:
    pool, workers = _pool(answers), _workers(answers)
    return (
        f"policy:   # is aligned\n  model_name_or_path: {_spelled(answers.policy)}\n"
        f"sft:   # null for a policy that follows instructions already\n{workers}"
        f"reference:\n{pool}"
        f"align:\n  loss_type: sigmoid\n  beta: 0.5\n{workers}"
        f"evaluate:\n{pool}  num_prompts: 0   # answers to write; they need a gold_model\n"
    )


def _pool(answers: Answers) -> str:
    return f"  num_actors: {max(1, answers.gpus)}\n  gpus_per_actor: {min(1, answers.gpus)}\n"


def _workers(answers: Answers) -> str:
    return f"  num_workers: {max(1, answers.gpus)}\n"


def _spelled(text: str) -> str:
    """As YAML has it, quoted where it must be."""
    return yaml.safe_dump(text, width=10**6).removesuffix("...\n").strip()


def _free(to: Path) -> Path:
    """Refused before anything is asked.

    Raises:
        ConfigError: for what is there, or has no folder, or a name that no comment can hold.
    """
    if to.exists() or to.is_symlink():
        raise ConfigError(f"init: {str(to)!r} is there already; name another file, or remove it")
    if not to.parent.is_dir():
        raise ConfigError(f"init: there is no folder {str(to.parent)!r}; make it first")
    if not str(to).isprintable():
        raise ConfigError(f"init: {str(to)!r} has characters that cannot be shown; name another")
    return to


def _named(text: str) -> str:
    """Refused as soon as it is answered."""
    if not text.strip() or "\x00" in text:
        raise ConfigError(f"init: {text!r} names nothing; give a name")
    return text


def init(
    to: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="What to write.", callback=_free, is_eager=True),
    ] = Path("run.yaml"),
    data: Annotated[
        str,
        typer.Option(
            prompt="Where are the pairs (file, folder, URI)", callback=_named, help="The pairs."
        ),
    ] = "pairs.jsonl",
    labels: Annotated[
        Labels,
        typer.Option(
            prompt="How many pairs have a label of people", help="Of the pairs, labelled."
        ),
    ] = "some",
    *,
    annotator: Annotated[
        str,
        typer.Option(
            prompt="Model that labels the others (a weak one to train, such as Qwen/Qwen2.5-0.5B; "
            "where no pair has a label a reward model)",
            callback=_named,
            help="Weak model to train, or with labels none a ready reward model.",
        ),
    ],
    policy: Annotated[
        str, typer.Option(prompt="Policy to align (empty: scores alone)", help="The policy.")
    ] = "",
    gpus: Annotated[
        int, typer.Option(prompt="GPUs of the cluster (0: CPUs)", min=0, help="GPUs.")
    ] = 0,
    output_dir: Annotated[
        str, typer.Option(help="The run directory.", callback=_named)
    ] = "runs/mine",
) -> None:
    """Write a configuration to begin with; asks what no option says.

    Example: cwpo init run.yaml --data 'pairs/*.jsonl' --labels some --annotator Qwen/Qwen2.5-0.5B
    --policy Qwen/Qwen2.5-7B --gpus 8
    """
    answers = Answers(data, labels, annotator, policy.strip(), gpus, output_dir)
    name = shlex.quote(str(to))
    try:
        to.write_text(starting_file(answers, name), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"init: {str(to)!r} cannot be written: {error.strerror}") from error
    typer.echo(f"{to} is written; next: cwpo plan {name} --show 3")
