"""One device in; whether what this program computes on it is right, and how fast, out.

The oracles are stock Hugging Face models in fp32 on the CPU, and torch's plain optimizer there.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import ray
import torch
import transformers
from torch import Tensor, nn

from cwpo_dist import __version__
from cwpo_dist.check import tiny_models
from cwpo_dist.check.finding import Finding, Outcome, found
from cwpo_dist.config import ModelConfig, TrainingConfig
from cwpo_dist.lm import varlen
from cwpo_dist.lm.flops import useful_flops
from cwpo_dist.lm.load_settings import native_dtype
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores
from cwpo_dist.lm.packed import by_row
from cwpo_dist.lm.probe import choose_layout
from cwpo_dist.lm.rows import Row, collate
from cwpo_dist.planning.costs import measured_rate, timed
from cwpo_dist.scoring.devices import assigned_device, driver
from cwpo_dist.scoring.forward import RowForward
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.scoring.scorers import AnswerWorker
from cwpo_dist.storage import Store
from cwpo_dist.training.loop import Run, gradients
from cwpo_dist.training.meter import peak_flops
from cwpo_dist.training.torch_engine import TorchEngine

CPU = torch.device("cpu")
# Nats a token by which packed rows may miss fp32, beyond twice what stock plain rows do.
_NATS = 1e-4
# Relative error of all gradients together, packed against plain rows.
_GRADIENTS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
_LEARNING_RATE = 1e-3
_PAIRS = {False: 24, True: 1024}  # of a figure, by whether it is on a GPU
_TOKENS = {False: 2048, True: 16_384}  # of a micro-batch


def check_device(*, quick: bool) -> list[Finding]:
    """All parts, on the device that Ray reserved for this actor.

    Args:
        quick: leave out the figures.
    """
    device = assigned_device()
    dtype = native_dtype(device)
    parts: dict[str, Callable[[], Outcome]] = {
        "versions": lambda: versions(device),
        "packed rows": lambda: packed_rows(device, dtype),
        "optimizer": lambda: optimizer_step(device),
        "generation": lambda: generation(device),
        "same bits twice": lambda: same_bits(device, dtype),
    }
    if not quick:
        parts |= {
            "matrix products": lambda: products(device),
            "annotate": lambda: annotate_rate(device, dtype),
            "align": lambda: align_rate(device, dtype),
        }
    return [found(name, check) for name, check in parts.items()]


def versions(device: torch.device) -> Outcome:
    """What is installed, and where it runs."""
    figures: dict[str, object] = {
        "cwpo_dist": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "deepspeed": metadata.version("deepspeed"),
        "ray": ray.__version__,
        "device": platform.processor() or platform.machine(),
    }
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        figures |= {
            "device": about.name,
            "memory_gib": round(about.total_memory / 2**30, 1),
            "capability": f"{about.major}.{about.minor}",
            "cuda": torch.version.cuda,
            "driver": driver(),
        }
    return None, f"{figures['device']}, torch {torch.__version__}", figures


def packed_rows(device: torch.device, dtype: torch.dtype) -> Outcome:
    """Log-probs and gradients of packed rows, beside stock plain rows in the same precision."""
    given = [
        *tiny_models.rows(3, (200, 300), (40, 150)),
        *tiny_models.rows(3, (1, 20), (1, 30), seed=1),
        *tiny_models.rows(1, (129, 129), (127, 128), seed=2),
        *tiny_models.rows(1, (30, 60), (1, 90), seed=3, answers=7),
        *tiny_models.rows(1, (30, 60), (1, 90), seed=4, answers=1),
    ]
    model = tiny_models.policy(dtype, device)
    rounded = {name: tensor.float().cpu() for name, tensor in model.state_dict().items()}
    stock = tiny_models.policy(torch.float32, CPU)
    stock.load_state_dict(rounded)
    with torch.no_grad():
        wanted, plain = stock_logps(stock, given), stock_logps(model, given).cpu()
    plain_gradient = _gradient(model, stock_logps(model, given))
    module = AnswerLogProbs(model)
    choice = choose_layout(module, longest=512)
    batch = collate(given, choice.layout, 2).to(device)
    ours = module.token_logps(batch)
    gradient = _gradient(model, ours)
    error, stocks = (float((each - wanted).abs().max()) for each in (ours.detach().cpu(), plain))
    missed = float((gradient - plain_gradient).norm() / plain_gradient.norm())
    kernel = _kernel(device, dtype)
    right = (
        choice.layout == "packed"
        and error <= 2 * stocks + _NATS
        and missed <= _GRADIENTS[dtype]
        and (kernel != "row by row" or device.type == "cpu")
    )
    figures = {
        "layout": choice.layout,
        "attention": kernel,
        "largest_error_nats": error,
        "stock_error_nats": stocks,
        "gradient_error": missed,
    }
    said = f"{choice.layout}, attention {kernel}, off by {error:.1e} nats (stock {stocks:.1e})"
    return right, said, figures


def _kernel(device: torch.device, dtype: torch.dtype) -> str:
    heads = (torch.empty(1, count, 1, 64, device=device, dtype=dtype) for count in (4, 2, 2))
    query, key, value = heads
    return "by one kernel" if varlen.usable(query, key, value, 0.0, by_row) else "row by row"


def stock_logps(model: nn.Module, given: Sequence[Row]) -> Tensor:
    """Log-probs of answer tokens, one conversation at a time, by the model's own forward."""
    logps = []
    device = next(model.parameters()).device
    for row in given:
        for answer in row.answers:
            ids = torch.tensor([[*row.prompt, *answer]], device=device)
            logits = model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].float()
            answered = ids[0, len(row.prompt) :, None]
            logps.append(logits.log_softmax(-1).gather(1, answered)[:, 0])
    return torch.cat(logps)


def _gradient(model: nn.Module, logps: Tensor) -> Tensor:
    model.zero_grad()
    (-logps.mean()).backward()
    found_here = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(found_here).cpu()


def optimizer_step(device: torch.device) -> Outcome:
    """Two updates by the engine's AdamW, and by torch's plain one on the CPU, from one gradient."""
    config = TrainingConfig(learning_rate=_LEARNING_RATE, max_grad_norm=1e9)
    engine = TorchEngine(AnswerLogProbs(tiny_models.policy(torch.float32, device)), config, device)
    stock = tiny_models.policy(torch.float32, CPU)
    plain = torch.optim.AdamW(stock.parameters(), _LEARNING_RATE, weight_decay=0.0, foreach=False)
    generator = torch.Generator().manual_seed(0)
    mine: list[nn.Parameter] = [p for p in engine.module.parameters() if p.requires_grad]
    for _ in range(2):
        for ours, theirs in zip(mine, stock.parameters(), strict=True):
            drawn = torch.randn(theirs.shape, generator=generator)
            ours.grad, theirs.grad = drawn.to(device), drawn
        engine.step(_LEARNING_RATE)
        plain.step()
    pairs = [(a.detach().cpu(), b.detach()) for a, b in zip(mine, stock.parameters(), strict=True)]
    error = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
    said = f"AdamW off by {error:.1e} after two steps of {_LEARNING_RATE:g}"
    return error <= 1e-3 * _LEARNING_RATE, said, {"largest_error": error}


def generation(device: torch.device) -> Outcome:
    """Four answers by `generate`'s own worker, whose policy must lie on this device."""
    prompts = ["Why?", "How does it work?", "a", "One, two, three"]
    with tempfile.TemporaryDirectory(prefix="cwpo-check-") as folder:
        tiny_models.save(Path(folder, "policy"))
        store = Store(folder)
        asked = [
            {"pair_id": str(number), "tokens": [3 + byte % 200 for byte in prompt.encode()]}
            for number, prompt in enumerate(prompts)
        ]
        store.create_table(part("prompts", 0), pa.Table.from_pylist(asked))
        sampling = {"max_new_tokens": 8, "temperature": 1.0, "seed": 0}
        policy = ModelConfig(model_name_or_path=str(Path(folder, "policy")), max_length=64)
        worker = AnswerWorker(store, policy, sampling, together=len(prompts))
        there = worker.device
        output = worker(0, worker.read(0))
    right = there.type == device.type and output.rows.num_rows == len(prompts)
    return right, f"{output.rows.num_rows} answers on {there}", {"device": str(there)}


def same_bits(device: torch.device, dtype: torch.dtype) -> Outcome:
    """Log-probs and gradients of the same packed rows, computed twice."""
    module = AnswerLogProbs(tiny_models.policy(dtype, device))
    layout = choose_layout(module, longest=512).layout
    batch = collate(tiny_models.rows(4, (50, 150), (20, 80)), layout, 2).to(device)
    logps = [module.token_logps(batch) for _ in range(2)]
    gradient = [_gradient(module, each) for each in logps]
    same = [torch.equal(*logps), torch.equal(*gradient)]
    words = {True: "the same", False: "not the same"}
    said = f"log-probs {words[same[0]]}, gradients {words[same[1]]}"
    # On CUDA some sums are by atomics, in no fixed order: scores are promised, gradients are not.
    right = same[0] and (same[1] or device.type == "cuda")
    return right, said, {"log_probs": same[0], "gradients": same[1]}


def products(device: torch.device) -> Outcome:
    """What a large matrix product reaches: the rate that shares below are of."""
    rate = measured_rate(device)
    peak = peak_flops(device)
    said = f"{rate / 1e12:.2f} TFLOP/s" + (f", {rate / peak:.0%} of the card's" if peak else "")
    return None, said, {"tflops": rate / 1e12, "peak_tflops": peak and peak / 1e12}


def annotate_rate(device: torch.device, dtype: torch.dtype) -> Outcome:
    """Scores of pairs, as `annotate` makes them, but for tokenising."""
    large = device.type == "cuda"
    module = AnswerScores(tiny_models.classifier(dtype, device, large=large))
    forward = RowForward(module, 2, 1024, _TOKENS[large])
    given = tiny_models.rows(_PAIRS[large], (60, 300), (40, 250))
    forward(given[:8])
    seconds = timed(device, lambda: forward(given))
    return _rate(device, given, forward.flops.forward(given), seconds)


def align_rate(device: torch.device, dtype: torch.dtype) -> Outcome:
    """Forward and backward passes over pairs, as `align` makes them on one device, all weights."""
    large = device.type == "cuda"
    module = AnswerLogProbs(tiny_models.policy(dtype, device, large=large))
    layout = choose_layout(module, longest=1024).layout
    given = tiny_models.rows(_PAIRS[large] // 4, (60, 300), (40, 250))
    config = TrainingConfig(
        learning_rate=1e-9,
        global_batch_size=len(given),
        max_tokens_per_micro_batch=_TOKENS[large],
    )
    task = tiny_models.preferences(given)
    engine = TorchEngine(module, config, device)
    run = Run(config, 0, layout, 2)
    gradients(task, engine, run, 0, list(range(4)))
    seconds = timed(device, lambda: gradients(task, engine, run, 0, list(range(len(given)))))
    return _rate(device, given, 3 * useful_flops(module).forward(given), seconds)


def _rate(
    device: torch.device,
    given: Sequence[Row],
    flops: float,
    seconds: float,
) -> Outcome:
    tokens = sum(row.n_tokens for row in given)
    share = flops / seconds / measured_rate(device)
    figures = {
        "tokens_per_s": tokens / seconds,
        "pairs_per_s": len(given) / seconds,
        "useful_tflops": flops / seconds / 1e12,
        "share_of_products": share,
    }
    if device.type == "cuda":
        figures["gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return None, f"{tokens / seconds:,.0f} tokens/s, {share:.0%} of that rate", figures
