"""A whole GRPO step on one GPU, ours beside TRL's, on the same weights and prompts.

    python benchmarks/gpu/train.py                    # both, then a table and JSON
    python benchmarks/gpu/train.py --only ours --profile
    python benchmarks/gpu/train.py --tiny             # a smoke test on the CPU
    accelerate launch --multi_gpu --num_processes 2 benchmarks/gpu/train.py --only ours

Work: 64 prompts x 8 responses a process, prompts of 97 to 128 tokens, 128 new tokens, a 410M Llama shape with random
bf16 weights, GRPO with a frozen reference (beta 0.04), four microbatches of 128 rows, a trivial reward. TRL runs with
bf16 weights, without gradient checkpointing and with transformers' generate: the best setting found for it here; ours
keeps float32 masters, which is more work. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHAPE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=8,
             intermediate_size=4096, vocab_size=32000, max_position_embeddings=2048)  # fmt: skip
TINY = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
            vocab_size=512, max_position_embeddings=512)  # fmt: skip

STAGES = ("generate", "score", "learn", "rest")


class Work:
    """Sizes, weights, prompts: the same for both sides."""

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.shape = TINY if tiny else SHAPE
        self.num_prompts, self.group_size = (4, 2) if tiny else (64, 8)
        self.new_tokens, self.micro = (8, 4) if tiny else (128, 128)
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.rows = self.num_prompts * self.group_size
        vocab = {f"t{i}": i for i in range(self.shape["vocab_size"])}
        core = Tokenizer(models.WordLevel(vocab, unk_token="t1"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        # The stop token is one that a random model draws once in 32000: practically every response is cut off.
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core, eos_token="t2", pad_token="t0", padding_side="left"
        )
        gen = torch.Generator().manual_seed(0)
        low, high = (5, 9) if tiny else (97, 129)
        lengths = torch.randint(low, high, (self.num_prompts * 16,), generator=gen).tolist()
        self.texts = [
            " ".join(f"t{i}" for i in torch.randint(3, self.shape["vocab_size"], (n,), generator=gen).tolist())
            for n in lengths
        ]

    def model(self) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(**self.shape, pad_token_id=0, bos_token_id=None, eos_token_id=2, dtype=self.dtype)
        return LlamaForCausalLM(config).to(self.dtype)


def ours(work: Work, steps: int, warm: int, profile: bool) -> dict[str, Any]:
    from accelerate import Accelerator

    from torchbandit import BanditEnv, CausalLMPolicy, KLPenalty, PromptSet, Sampling
    from torchbandit.train.loop import BanditTrainer
    from torchbandit.train.options import LoopOptions

    accelerator = Accelerator(cpu=work.tiny)
    device = accelerator.device
    policy = CausalLMPolicy(
        work.model().to(device), work.tokenizer, sampling=Sampling(max_new_tokens=work.new_tokens), device=device
    )
    reference = work.model().to(device).requires_grad_(False)
    prompts = PromptSet.from_texts(work.texts, work.tokenizer, max_length=512)

    def reward(td: Any) -> torch.Tensor:
        return (td["tokens", "response"] % 2 * td["masks", "response"]).sum(-1).float()

    env = BanditEnv(
        prompts, [reward, KLPenalty(reference, coef=0.0)], num_prompts=work.num_prompts, group_size=work.group_size,
        device=device,
    )  # fmt: skip
    options = LoopOptions(algo="grpo", loss_kl_coef=0.04, micro_batch_size=work.micro, lr=1e-6, steps=warm + steps)
    trainer = BanditTrainer(env, policy, options, accelerator=accelerator)
    begin = time.perf_counter()
    first = trainer.step()
    sync(device)
    compile_s = time.perf_counter() - begin
    for _ in range(warm - 1):
        trainer.step()
    sync(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    lines, seconds = [], []
    for _ in range(steps):
        sync(device)
        begin = time.perf_counter()
        lines.append(trainer.step())
        sync(device)
        seconds.append(time.perf_counter() - begin)
    for line in [first, *lines]:
        assert abs(line["response_length"] - work.new_tokens) < 0.02 * work.new_tokens or work.tiny, line
        assert line["grad_norm"] > 0 and line["unscorable"] == 0, line
    # At the first step the policy is its own reference: what is generated must be scored alike.
    assert abs(first["kl"]) < 0.02 * work.new_tokens, first["kl"]
    if profile and accelerator.is_main_process:
        profiled(trainer)
    world = accelerator.num_processes
    step_s = statistics.median(seconds)
    return {
        "name": "torchbandit", "world": world, "s_per_step": step_s, "spread": [min(seconds), max(seconds)],
        "samples_per_s": world * work.rows / step_s, "first_step_s": compile_s,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
        "split": {k: statistics.median(line[f"time/{k}_s"] for line in lines) for k in STAGES},
        "kl_first": first["kl"], "grad_norm": first["grad_norm"], "reward": [first["reward"], lines[-1]["reward"]],
    }  # fmt: skip


def profiled(trainer: Any) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with record(activities=activities) as prof:
        trainer.step()
        sync(trainer.env.device)
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(prof.key_averages().table(sort_by=by, row_limit=32, max_name_column_width=70))


def trl(work: Work, steps: int, warm: int) -> dict[str, Any]:
    import datasets
    import trl
    from transformers import TrainerCallback

    device = torch.device("cpu" if work.tiny else "cuda")
    marks: list[float] = []

    class Times(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            sync(device)
            marks.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            sync(device)
            marks.append(time.perf_counter())

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [float(sum(i % 2 for i in ids)) for ids in completion_ids]

    with tempfile.TemporaryDirectory() as folder:
        work.model().save_pretrained(folder + "/model")
        work.tokenizer.save_pretrained(folder + "/model")
        settings: dict[str, Any] = dict(
            per_device_train_batch_size=work.micro, gradient_accumulation_steps=work.rows // work.micro,
            num_generations=work.group_size, max_completion_length=work.new_tokens, beta=0.04, temperature=1.0,
            gradient_checkpointing=False, use_vllm=False, bf16=not work.tiny, learning_rate=1e-6,
            model_init_kwargs={"dtype": "float32" if work.tiny else "bfloat16"},
        )  # fmt: skip
        config = trl.GRPOConfig(
            output_dir=folder + "/out", max_steps=warm + steps, report_to="none", save_strategy="no",
            logging_strategy="steps", logging_steps=1, disable_tqdm=True, use_cpu=work.tiny, **settings,
        )  # fmt: skip
        trainer = trl.GRPOTrainer(
            model=folder + "/model", reward_funcs=reward, args=config, processing_class=work.tokenizer,
            train_dataset=datasets.Dataset.from_dict({"prompt": work.texts}), callbacks=[Times()],
        )  # fmt: skip
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    logs = [line for line in trainer.state.log_history if "completions/mean_length" in line]
    assert abs(logs[-1]["completions/mean_length"] - work.new_tokens) < 0.02 * work.new_tokens or work.tiny, logs[-1]
    seconds = [end - begin for begin, end in zip(marks[::2], marks[1::2], strict=True)][warm:]
    step_s = statistics.median(seconds)
    return {
        "name": f"TRL {trl.__version__}", "s_per_step": step_s, "spread": [min(seconds), max(seconds)],
        "samples_per_s": work.rows / step_s, "settings": settings,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
    }  # fmt: skip


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("ours", "trl"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm", type=int, default=2)
    args = parser.parse_args()
    work = Work(args.tiny)
    rows = []
    if args.only != "trl":
        rows.append(ours(work, args.steps, args.warm, args.profile))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if args.only != "ours":
        rows.append(trl(work, args.steps, args.warm))
    for row in rows:
        split = " ".join(f"{k} {v:.3f}" for k, v in row.get("split", {}).items())
        print(f"{row['name']:14} {row['s_per_step']:.3f} s/step  {row['samples_per_s']:.0f} samples/s  {split}")
    result = {"work": "end to end", "rows": rows, "torch": torch.__version__}
    if torch.cuda.is_available():
        result["card"] = torch.cuda.get_device_name()
    if len(rows) == 2:
        result["ratio"] = rows[1]["s_per_step"] / rows[0]["s_per_step"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
