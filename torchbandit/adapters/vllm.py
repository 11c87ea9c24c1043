"""vLLM as the engine that answers prompts: one callable that writes the response keys. (B, P, T: see batch.py.)

The engine computes its log-probs with other kernels, and perhaps other weights, than the policy that learns from them.
So the engine's are written as ("log_probs","sampler"). The trainer computes the policy's own where they are absent, and
weighs what it learns by their ratio (`LoopOptions(mismatch=…)`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchbandit import batch
from torchbandit.generation import Sampling
from torchbandit.policy import CausalLMPolicy


class VLLMEngine:
    """Answers prompts with a `vllm.LLM` in place of `policy.generate`.

        llm = vllm.LLM(path, logprobs_mode="processed_logprobs", enable_prefix_caching=True)
        trainer = BanditTrainer(env, policy, GRPO(), options, generate=VLLMEngine(llm, policy))

    Prompts and responses go through lists on the host, since that is vLLM's interface. Bringing the policy's updates
    to `llm` is left to the caller, and so is `llm.reset_prefix_cache()` after it: without it vLLM answers from keys of
    the old weights. `logprobs_mode` makes vLLM report log-probs at the sampling temperature.

    Args:
        llm: anything with vLLM's `generate(prompts, sampling_params, use_tqdm=...)`.
        policy: its sampling, stop and pad ids are used.
        seed: of the requests; every call and row gets its own.
    Raises:
        ValueError: the policy samples with top-k, top-p or temperature 0, for which a ratio of log-probs has no
            meaning.
    """

    def __init__(self, llm: Any, policy: CausalLMPolicy, *, seed: int = 0) -> None:
        sampling: Sampling = policy.sampling
        if sampling.temperature == 0 or sampling.top_k or sampling.top_p < 1:
            raise ValueError(f"policy: must sample with temperature alone (above 0) for training, got {sampling}")
        self.llm, self.policy = llm, policy
        self.seed, self.calls = seed, 0

    def __call__(self, td: TensorDictBase) -> TensorDict:
        """Answer every prompt.

        Args:
            td: reads ("tokens","prompt") [B, P] int64 and ("masks","prompt") [B, P] bool.
        Returns:
            td's keys, ("tokens"|"masks","response") [B, T], `finished` and `temperature` [B], and the engine's
            log-probs as ("log_probs","sampler") [B, T] float32. td is left as it was.
        Raises:
            ValueError: the engine reported no log-probs, or more tokens than asked for.
        """
        try:
            from vllm import SamplingParams
        except ImportError:
            raise ImportError("torchbandit.adapters.vllm needs vLLM: see its own page on how to install it") from None
        sampling, mask = self.policy.sampling, td[batch.PROMPT_MASK].cpu()
        prompts = [row[real].tolist() for row, real in zip(td[batch.PROMPT].cpu(), mask, strict=True)]
        params = [
            SamplingParams(
                n=1, temperature=sampling.temperature, max_tokens=sampling.max_new_tokens, logprobs=0,
                stop_token_ids=list(self.policy.stop_ids), ignore_eos=True, detokenize=False,
                seed=self.seed + self.calls * len(prompts) + i,
            )
            for i in range(len(prompts))
        ]  # fmt: skip
        self.calls += 1
        made = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return self._written(td, [request.outputs[0] for request in made])

    def _written(self, td: TensorDictBase, said: Sequence[Any]) -> TensorDict:
        T, device = self.policy.sampling.max_new_tokens, td[batch.PROMPT].device
        tokens = torch.full((len(said), T), self.policy.pad_id)
        sampler, real = torch.zeros(len(said), T), torch.zeros(len(said), T, dtype=torch.bool)
        for row, output in enumerate(said):
            ids = list(output.token_ids)
            if output.logprobs is None or len(output.logprobs) != len(ids) or len(ids) > T:
                got = "none" if output.logprobs is None else len(output.logprobs)
                raise ValueError(
                    f"vllm: must report a log-prob for each of at most {T} tokens, got {got} for {len(ids)}"
                )
            tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            sampler[row, : len(ids)] = torch.tensor([at[i].logprob for at, i in zip(output.logprobs, ids, strict=True)])
            real[row, : len(ids)] = True
        finished = torch.tensor([output.finish_reason == "stop" for output in said])
        out: TensorDict = td.copy()
        written: dict[batch.Key, Tensor] = {
            batch.RESPONSE: tokens, batch.RESPONSE_MASK: real, batch.FINISHED: finished,
            batch.TEMPERATURE: torch.full((len(said),), float(self.policy.sampling.temperature)),
            batch.SAMPLER_LOG_PROBS: sampler,
        }  # fmt: skip
        for key, value in written.items():
            out.set(key, value.to(device))
        return out
