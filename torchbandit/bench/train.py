"""`torchbandit bench train`: a whole GRPO step, ours beside TRL's, on the same weights and prompts.

Work: 64 prompts x 8 responses a process, prompts of 97 to 128 tokens, 128 new tokens, a 410M Llama shape with random
bf16 weights, GRPO with a frozen reference (beta 0.04), four microbatches of 128 rows, a trivial reward. The ceiling is
the time that the matrix products of the forward and backward passes and the bytes of the decode steps would take at
the rates measured in the same run.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import LlamaForCausalLM

from torchbandit.bench.frame import Frame, Line, Peer
from torchbandit.bench.generate import step_bytes
from torchbandit.bench.models import llama, word_tokenizer
from torchbandit.env import BanditEnv
from torchbandit.generation import Sampling
from torchbandit.learn import GRPO
from torchbandit.policy import CausalLMPolicy
from torchbandit.prompts import PromptSet
from torchbandit.rewards import KLPenalty

ROWS = ("ours", "trl")
STAGES = ("generate", "score", "learn", "rest")


class Work:
    """Sizes, weights, prompts: the same for both sides."""

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.num_prompts, self.group_size = (4, 2) if tiny else (64, 8)
        self.new_tokens, self.micro = (8, 4) if tiny else (128, 128)
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.rows = self.num_prompts * self.group_size
        self.shape = "tiny" if tiny else "410m"
        vocabulary: int = llama(self.shape).vocab_size
        # The stop token is one that a random model draws once in 32000: practically every response is cut off.
        self.tokenizer = word_tokenizer(vocabulary)
        self.tokenizer.chat_template = None
        gen = torch.Generator().manual_seed(0)
        low, high = (5, 9) if tiny else (97, 129)
        self.lengths = torch.randint(low, high, (self.num_prompts * 16,), generator=gen).tolist()
        self.texts = [
            " ".join(f"t{i}" for i in torch.randint(3, vocabulary, (n,), generator=gen).tolist()) for n in self.lengths
        ]

    def model(self) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = llama(
            self.shape, max_position_embeddings=2048, pad_token_id=0, bos_token_id=None, eos_token_id=2,
            dtype=self.dtype,
        )  # fmt: skip
        made: Any = LlamaForCausalLM(config)
        model: LlamaForCausalLM = made.to(self.dtype)
        return model

    def least_seconds(self, model: Any, limits: dict[str, float]) -> dict[str, float]:
        """What the limits of the machine allow, stage by stage."""
        prompt = statistics.mean(self.lengths)
        body = sum(p.numel() for layer in model.base_model.layers for p in layer.parameters())
        head = model.lm_head.weight.numel()
        forward = 2.0 * self.rows * (body * (prompt + self.new_tokens) + head * self.new_tokens)
        prefill = 2.0 * body * self.num_prompts * prompt
        decode = self.new_tokens * step_bytes(model, self.rows, prompt + self.new_tokens / 2)
        return {
            "generate": prefill / limits["matmul_flop_s"] + decode / limits["read_bytes_s"],
            "score": forward / limits["matmul_flop_s"], "learn": 3 * forward / limits["matmul_flop_s"],
        }  # fmt: skip


def run(frame: Frame) -> None:
    if not frame.cuda and not frame.tiny:
        frame.leave_out("train", "no CUDA device; --tiny shows that it runs")
        return
    work, steps, warm = Work(frame.tiny), 2 if frame.tiny else 6, 1 if frame.tiny else 2
    chosen = frame.chosen(ROWS)
    line: Line | None = None
    if "ours" in chosen:
        line = ours(frame, work, steps, warm)
    if "trl" in chosen and frame.has("trl", "train") and frame.has("datasets", "train"):
        for name, other in {"": {}, **frame.setting("trl", "others")}.items():
            if frame.cuda:
                gc.collect()  # the last one's models
                torch.cuda.empty_cache()
            try:
                peer = trl(frame, work, steps, warm, name, other)
            except Exception as error:
                if not name:
                    raise
                frame.leave_out(f"train: TRL, {name}", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
                continue
            if line is None:
                line = peer
            else:
                line.peers.append(Peer(peer.work, peer.rate, line.rate / peer.rate))
                line.more[f"peak of {peer.work}, GB"] = peer.peak_gb
    if line is not None:
        if line.peers and "ours" in chosen:
            line.notes.append("ours keeps float32 masters of the weights, which TRL at this setting does not")
        frame.add(line)


def ours(frame: Frame, work: Work, steps: int, warm: int) -> Line:
    from accelerate import Accelerator

    from torchbandit.train.loop import BanditTrainer
    from torchbandit.train.options import LoopOptions

    accelerator = Accelerator(cpu=not frame.cuda)
    device = accelerator.device
    model = work.model().to(device)
    policy = CausalLMPolicy(
        model, work.tokenizer, sampling=Sampling(max_new_tokens=work.new_tokens), device=device, trainable=True
    )
    reference = work.model().to(device).requires_grad_(False)
    prompts = PromptSet.from_texts(work.texts, work.tokenizer, max_length=512)

    def reward(td: Any) -> torch.Tensor:
        odd: torch.Tensor = td["tokens", "response"] % 2 * td["masks", "response"]
        return odd.sum(-1).float()

    env = BanditEnv(
        prompts, [reward, KLPenalty(reference, coef=0.0)], num_prompts=work.num_prompts, group_size=work.group_size,
        device=device,
    )  # fmt: skip
    options = LoopOptions(loss_kl_coef=0.04, micro_batch_size=work.micro, lr=1e-6, steps=warm + steps)
    trainer = BanditTrainer(env, policy, GRPO(), options, accelerator=accelerator)
    begin = time.perf_counter()
    first = trainer.step()
    frame.wait()
    first_s = time.perf_counter() - begin
    for _ in range(warm - 1):
        trainer.step()
    if frame.cuda:
        torch.cuda.reset_peak_memory_stats()
    told: list[dict[str, Any]] = []
    seconds = []
    for _ in range(steps):
        frame.wait()
        begin = time.perf_counter()
        told.append(trainer.step())
        frame.wait()
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() / 1e9 if frame.cuda else None
    for metrics in [first, *told]:
        assert abs(metrics["response_length"] - work.new_tokens) < 0.02 * work.new_tokens or work.tiny, metrics
        assert metrics["grad_norm"] > 0 and metrics["unscorable"] == 0, metrics
    # At the first step the policy is its own reference: what is generated must be scored alike.
    assert abs(first["kl"]) < 0.02 * work.new_tokens, first["kl"]
    syncs = frame.host_syncs(trainer.step)
    if frame.profile:
        profiled(frame, trainer)
    rows, took = accelerator.num_processes * work.rows, statistics.median(seconds)
    least = work.least_seconds(model, frame.limits())
    split = {stage: statistics.median(metrics[f"time/{stage}_s"] for metrics in told) for stage in STAGES}
    return Line(
        "train", f"GRPO, 410m, {accelerator.num_processes} process(es) of 64 x 8 rows", rows / took, "samples/s",
        rows / max(seconds), rows / min(seconds), percent=100 * sum(least.values()) / took,
        ceiling="the products and bytes of its stages", peak_gb=peak, host_syncs=syncs,
        more={"s a step": took, "split, s": split, "split at the limits, s": least, "first step, s": first_s,
              "outside generate, score, learn, %": 100 * split["rest"] / took, "kl of the first step": first["kl"],
              "grad_norm": first["grad_norm"], "reward, first": first["reward"], "reward, last": told[-1]["reward"]},
    )  # fmt: skip


def profiled(frame: Frame, trainer: Any) -> None:
    """Print the kernels of one step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if frame.cuda else [])
    with record(activities=activities) as trace:
        trainer.step()
        frame.wait()
    by = "self_cuda_time_total" if frame.cuda else "self_cpu_time_total"
    print(trace.key_averages().table(sort_by=by, row_limit=32, max_name_column_width=70))


def trl(frame: Frame, work: Work, steps: int, warm: int, name: str, other: Mapping[str, Any]) -> Line:
    """TRL in the settings of the frame, but for `other`."""
    import datasets
    import trl
    from transformers import TrainerCallback

    marks: list[float] = []

    class Marks(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            frame.wait()
            marks.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            frame.wait()
            marks.append(time.perf_counter())

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [float(sum(i % 2 for i in ids)) for ids in completion_ids]

    settings: dict[str, Any] = dict(
        per_device_train_batch_size=work.micro, gradient_accumulation_steps=work.rows // work.micro,
        num_generations=work.group_size, max_completion_length=work.new_tokens, beta=0.04, temperature=1.0,
        learning_rate=1e-6,
    ) | {key: value for key, value in frame.settings["trl"].items() if key != "others"} | dict(other)  # fmt: skip
    if not frame.cuda:
        settings |= {"bf16": False, "model_init_kwargs": {"dtype": "float32"}, "use_cpu": True}
    with tempfile.TemporaryDirectory() as folder:
        work.model().save_pretrained(folder + "/model")
        work.tokenizer.save_pretrained(folder + "/model")
        config = trl.GRPOConfig(
            output_dir=folder + "/out", max_steps=warm + steps, report_to="none", save_strategy="no",
            logging_strategy="steps", logging_steps=1, disable_tqdm=True, **settings,
        )  # fmt: skip
        trainer = trl.GRPOTrainer(
            model=folder + "/model", reward_funcs=reward, args=config, processing_class=work.tokenizer,
            train_dataset=datasets.Dataset.from_dict({"prompt": work.texts}), callbacks=[Marks()],
        )  # fmt: skip
        if frame.cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    logs = [line for line in trainer.state.log_history if "completions/mean_length" in line]
    assert abs(logs[-1]["completions/mean_length"] - work.new_tokens) < 0.02 * work.new_tokens or work.tiny, logs[-1]
    seconds = [end - begin for begin, end in zip(marks[::2], marks[1::2], strict=True)][warm:]
    took = statistics.median(seconds)
    work_name = ", ".join(filter(None, (f"TRL {trl.__version__}", "GRPOTrainer", name)))
    return Line(
        "train", work_name, work.rows / took, "samples/s", work.rows / max(seconds),
        work.rows / min(seconds), more={"settings": settings, "s a step": took},
        peak_gb=torch.cuda.max_memory_allocated() / 1e9 if frame.cuda else None,
    )  # fmt: skip
