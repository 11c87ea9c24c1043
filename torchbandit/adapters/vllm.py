"""vLLM as the engine that answers prompts: one callable that writes the response keys. (B, P, T: see batch.py.)

The engine computes its log-probs with other kernels, and perhaps other weights, than the policy that learns from them.
So both are kept: the policy's own as ("log_probs","response"), the engine's as ("log_probs","sampler"), and their
truncated ratio as `importance_weights`, the `weights` of every loss in `torchbandit.losses`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchbandit import batch
from torchbandit.generation import Sampling
from torchbandit.losses import importance_weights
from torchbandit.policy import CausalLMPolicy

SAMPLER_LOG_PROBS = ("log_probs", "sampler")
IMPORTANCE_WEIGHTS = "importance_weights"


class VLLMEngine:
    """Answers prompts with a `vllm.LLM` in place of `policy.generate`.

        llm = vllm.LLM(path, logprobs_mode="processed_logprobs", enable_prefix_caching=True)
        engine = VLLMEngine(llm, policy)
        td = env.step(engine(env.reset()))

    Prompts and responses go through lists on the host, since that is vLLM's interface. Bringing the policy's updates
    to `llm` is left to the caller. `logprobs_mode` makes vLLM report log-probs at the sampling temperature.

    Args:
        llm: anything with vLLM's `generate(prompts, sampling_params, use_tqdm=...)`.
        policy: scores what the engine said; its sampling, stop and pad ids are used.
        cap: the greatest importance weight.
        seed: of the requests; every call and row gets its own.
    Raises:
        ValueError: the policy samples with top-k, top-p or temperature 0, for which a ratio of log-probs has no
            meaning.
    """

    def __init__(self, llm: Any, policy: CausalLMPolicy, *, cap: float = 2.0, seed: int = 0) -> None:
        sampling: Sampling = policy.sampling
        if sampling.temperature == 0 or sampling.top_k or sampling.top_p < 1:
            raise ValueError(f"policy: must sample with temperature alone (above 0) for training, got {sampling}")
        self.llm, self.policy, self.cap = llm, policy, cap
        self.seed, self.calls = seed, 0

    def __call__(self, td: TensorDictBase) -> TensorDict:
        """Answer every prompt.

        Args:
            td: reads ("tokens","prompt") [B, P] int64 and ("masks","prompt") [B, P] bool.
        Returns:
            td's keys and those of `policy.generate`, with ("log_probs","sampler") [B, T] float32, the engine's, and
            `importance_weights` [B, T] float32, min(policy / engine, cap) a token. td is left as it was.
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
            SAMPLER_LOG_PROBS: sampler,
        }  # fmt: skip
        for key, value in written.items():
            out.set(key, value.to(device))
        with torch.no_grad():
            scores = self.policy(out)
        out.set(batch.LOG_PROBS, scores["log_probs"])
        if self.policy.has_critic:
            out.set(batch.VALUES, scores["values"])
        weights = importance_weights(
            out[batch.LOG_PROBS], out[SAMPLER_LOG_PROBS], out[batch.RESPONSE_MASK], cap=self.cap
        )
        out.set(IMPORTANCE_WEIGHTS, weights)
        return out
