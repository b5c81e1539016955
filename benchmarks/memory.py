"""A model and a training's settings in; the host memory that a worker took, beside what plan says.

    python benchmarks/memory.py [--model FOLDER] [--layers 4] [--lora] [--zero-stage 2] \
      [--max-tokens 2048] [--gradient-checkpointing] [--prompt 100] [--sequence-parallel 1]

Workers on CPU in fp32, as Ray Train starts them but without Ray: a DeepSpeed engine in a group of
one, or of all that share a sequence; the layout's probe; one AdamW step of DPO over two full
micro-batches of rows with a prompt and two answers of 100 tokens each. Counted is the peak of
resident memory above what the imports took, of the worker that had most. Without a model it is one
of 6 layers, width 128 and 8 heads, of random weights. The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a process, decided before torch
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import measure
import torch
import torch.distributed as dist
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from cwpo_dist.config import LoraConfig, ModelConfig, TrainingConfig
from cwpo_dist.lm.loading import load_policy
from cwpo_dist.lm.modules import AnswerLogProbs
from cwpo_dist.lm.probe import choose_layout
from cwpo_dist.lm.recompute import let_recompute, start_training
from cwpo_dist.lm.rows import Row
from cwpo_dist.planning.memory import training_memory
from cwpo_dist.runs.sizes import model_size, policy, trained_size
from cwpo_dist.training import deepspeed_engine as engine
from cwpo_dist.training.loop import Hooks, Run, train
from cwpo_dist.training.lora import add_lora
from cwpo_dist.training.tasks import Preference

ANSWER = 100  # tokens
MADE = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6}
MADE |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 32768}


def step(model: ModelConfig, config: TrainingConfig, prompt: int) -> str:
    """What a worker does until its first step is done; the layout of its rows."""
    settings = engine.deepspeed_config(config, torch.float32)
    with engine.sharded_loading(settings):
        policy = load_policy(model)
    let_recompute(policy)
    adapted = (
        policy.requires_grad_(True)
        if config.lora is None
        else add_lora(policy, config.lora, "logps", 0)
    )
    module = AnswerLogProbs(adapted)
    built = engine.DeepSpeedEngine(module, config, settings)
    layout = choose_layout(module, longest=model.max_length, group=built.sequence).layout
    draw = partial(torch.randint, 100, 1000, generator=torch.Generator().manual_seed(0))
    rows = [
        Row(draw((prompt,)).tolist(), tuple(draw((2, ANSWER)).tolist()))
        for _ in range(config.global_batch_size)
    ]
    names, ones = [str(k) for k in range(len(rows))], [1.0] * len(rows)
    task = Preference(rows, names, ones, [(-1.0, -2.0)] * len(rows), "sigmoid", 0.1)
    start_training(module)
    train(task, built, Run(config, 0, layout, 0), Hooks())
    return layout


def worker(
    rank: int, folder: str, model: ModelConfig, config: TrainingConfig, prompt: int
) -> tuple[int, int, str]:
    """What one of them took for its work, and before it; and the layout of its rows."""
    world = config.sequence_parallel_size
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)})
    meet = f"file://{folder}/group"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    engine.join_process_group()
    before = measure.peak_resident()
    layout = step(model, config, prompt)
    return measure.peak_resident() - before, before, layout


def main(
    model: Annotated[str | None, typer.Option(help="A Hugging Face folder.")] = None,
    layers: Annotated[int | None, typer.Option(help="Keep the first so many.")] = None,
    lora: Annotated[bool, typer.Option(help="Train rank 8 adapters.")] = False,
    zero_stage: Annotated[int, typer.Option(help="0 to 3.")] = 2,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a micro-batch.")] = 2048,
    gradient_checkpointing: Annotated[bool, typer.Option()] = False,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = ANSWER,
    sequence_parallel: Annotated[int, typer.Option(help="Workers that share a row.")] = 1,
) -> None:
    """Measures one case."""
    folder = tempfile.mkdtemp()
    if model is None:
        LlamaForCausalLM(LlamaConfig.from_dict(MADE)).save_pretrained(model := f"{folder}/model")
    given = ModelConfig(model_name_or_path=model, num_hidden_layers=layers)
    config = TrainingConfig.model_validate(
        {
            "learning_rate": 1e-6,
            "max_steps": 1,
            "global_batch_size": 2 * (max_tokens // (prompt + 2 * ANSWER)),
            "max_tokens_per_micro_batch": max_tokens,
            "zero_stage": zero_stage,
            "num_workers": sequence_parallel,
            "sequence_parallel_size": sequence_parallel,
            "lora": LoraConfig() if lora else None,
            "gradient_checkpointing": gradient_checkpointing,
        }
    )
    size = replace(model_size(given), trained=(trained_size(given, policy, config.lora),))
    planned = training_memory(config, size, on_gpu=False)
    told = [(rank, folder, given, config, prompt) for rank in range(sequence_parallel)]
    with get_context("spawn").Pool(sequence_parallel) as workers:
        measured, before, layout = max(workers.starmap(worker, told, chunksize=1))
    figures = {
        "layers": layers,
        "lora": lora,
        "zero_stage": zero_stage,
        "max_tokens": max_tokens,
        "sequence_parallel": sequence_parallel,
        "gradient_checkpointing": gradient_checkpointing,
        "layout": layout,
        "imports_mib": before // 2**20,
        "measured_mib": measured // 2**20,
        "planned_mib": planned.total // 2**20,
        "planned_over_measured": round(planned.total / measured, 3),
        "parts_mib": {name: held and held // 2**20 for name, held in planned.parts().items()},
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)
