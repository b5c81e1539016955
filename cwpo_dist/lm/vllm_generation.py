"""Prompts as token ids in, answers out, by vLLM: on one GPU, or on several that share a policy.

vLLM computes the model and draws tokens. How a prompt reads, what ends an answer and how its tokens
become text is as in `generation`. Noise is a function of (seed, prompt) here too, another one; but
vLLM's logits depend in their last bits on what is computed beside them, so that another batch
changes an answer where two tokens are equal to within rounding, in bf16 more often than in fp32.
vLLM is an extra (`vllm`), imported when a policy is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.encoder import load_tokenizer
from cwpo_dist.lm.foreign import FOREIGN_ERRORS, model_fault
from cwpo_dist.lm.generation import check_fit, decoded, end_tokens, stream_seed
from cwpo_dist.lm.load_settings import dtype_of
from cwpo_dist.lm.loading import ModelError, load_policy, model_path

# Before vLLM is imported. Its engine in this process ends with it, and computes the same prompts in
# the same order; it tells nobody that it runs.
_SURROUNDINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class VllmWriter:
    """A policy that vLLM holds, and answers with."""

    def __init__(
        self,
        model: ModelConfig,
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        batch_size: int,
        gpus: int,
    ) -> None:
        """Loads the policy from the folder, and under the conditions, that `generate` has.

        Args:
            model: where it is.
            max_new_tokens: longest answer, in tokens.
            temperature: 0 is greedy.
            seed: of the noise.
            batch_size: prompts answered side by side.
            gpus: of this process, each of which holds a part of every layer; 0: on the CPU.

        Raises:
            ModelError: for a model that `generate` would refuse, or vLLM does.
        """
        os.environ |= _SURROUNDINGS | os.environ
        self.new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.tokenizer = load_tokenizer(model)
        self.skeleton = load_policy(model, device="meta")  # reads no weight, and refuses what lacks
        words = self.skeleton.config.get_text_config().vocab_size
        self.ends = [end for end in end_tokens(self.skeleton, self.tokenizer) if end < words]
        longest = model.max_length + max_new_tokens
        positions = getattr(self.skeleton.config, "max_position_embeddings", None)
        device = torch.device("cuda" if gpus else "cpu")
        try:
            from vllm import LLM

            self.engine = LLM(
                model=model_path(model.model_name_or_path),
                revision=model.revision,
                skip_tokenizer_init=True,  # it is given tokens, and gives tokens
                trust_remote_code=False,
                load_format="safetensors",
                generation_config="vllm",  # no key of the model's own file acts
                dtype=dtype_of(model, device),
                max_model_len=min(longest, positions or longest),
                max_num_seqs=batch_size,
                tensor_parallel_size=max(1, gpus),
                distributed_executor_backend="mp" if gpus > 1 else "uni",
                enforce_eager=not gpus,  # on a CPU it would need a compiler
                enable_prefix_caching=False,  # what was answered before changes no bit
            )
        except FOREIGN_ERRORS as error:
            raise ModelError(
                f"model_name_or_path: {model.model_name_or_path!r}: vLLM cannot load it "
                f"({model_fault(error)}); set evaluate.engine to transformers, or give another "
                "model"
            ) from error

    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """One answer a prompt, without special tokens.

        Raises:
            ConfigError: where a prompt and its answer do not fit the model's positions.
        """
        return decoded(self.tokenizer, self.tokens(prompts))

    def tokens(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The tokens of the answers, with what ends them."""
        from vllm import SamplingParams

        check_fit(self.skeleton, prompts, self.new_tokens)
        each = [
            SamplingParams(
                max_tokens=self.new_tokens,
                temperature=self.temperature,
                seed=stream_seed(self.seed, prompt),
                stop_token_ids=self.ends,
                detokenize=False,
            )
            for prompt in prompts
        ]
        given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.engine.generate(given, each, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]
