"""A configuration that names files of this machine in; the same as a job reads it elsewhere out."""

from __future__ import annotations

import glob
import shutil
from pathlib import Path
from typing import Any

from cwpo_dist.config import Config, ConfigError, TrainingConfig
from cwpo_dist.config.deepspeed import read_section


def portable(config: Config, folder: Path) -> dict[str, Any]:
    """The configuration as it can be read elsewhere.

    Local paths become absolute (every node must see them), a DeepSpeed JSON is read in, and
    template files are copied into `folder`, the job's working directory.

    Raises:
        ConfigError: for a template or DeepSpeed file that is not there.
    """
    data = config.model_dump(mode="json")
    if "://" not in data["output_dir"]:
        data["output_dir"] = str(Path(data["output_dir"]).absolute())
    for source in data["prepare"]["sources"]:
        source["path"] = _absolute(source["path"])
    for name, model in _models(data):
        model["model_name_or_path"] = _absolute(model["model_name_or_path"])
        if model["chat_template"] not in {"tokenizer", "plain"}:
            template = Path(model["chat_template"])
            copy = f"{name}-{template.name}"
            shutil.copyfile(_existing(template, f"{name}.chat_template"), folder / copy)
            model["chat_template"] = copy
    for name in config.sections(TrainingConfig):
        data[name]["deepspeed"] = _read_in(name, data[name]["deepspeed"])
    return data


def _models(data: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    found = {
        "weak": data["weak"],
        "policy": data["policy"],
        "annotate.model": data["annotate"]["model"],
        **{f"annotate.models.{k}": m for k, m in enumerate(data["annotate"]["models"])},
        "evaluate.gold_model": data["evaluate"]["gold_model"],
    }
    return [(name, model) for name, model in found.items() if model is not None]


def _absolute(path: str) -> str:
    """A file, folder or glob that is here as an absolute path; hub ids and URIs as they are."""
    here = "://" not in path and (Path(path).exists() or any(True for _ in glob.iglob(path)))
    return str(Path(path).absolute()) if here else path


def _read_in(name: str, deepspeed: dict[str, object] | str | None) -> dict[str, object] | None:
    try:
        return read_section(deepspeed) if isinstance(deepspeed, str) else deepspeed
    except ConfigError as error:
        raise ConfigError(f"{name}.{error}") from None


def _existing(path: Path, field: str) -> Path:
    if not path.is_file():
        raise ConfigError(f"{field}: no file {str(path)!r}; correct its path")
    return path
