"""`torchbandit train` on the end-to-end work: the standalone loop, RLlib, and two GPUs of one host.

    python benchmarks/gpu/engines.py --places local 0/0              # one GPU
    python benchmarks/gpu/engines.py --places local accelerate 2/2   # two GPUs: the same work a GPU
    python benchmarks/gpu/engines.py --algos ppo grpo                # each algorithm at each place
    python benchmarks/gpu/engines.py --tiny                          # a smoke test on the CPU

Places: `local` is one process, `accelerate` two of them, `R/L` RLlib with R env runners and L learners (0/0: all in
the driver). Sizes are those of `torchbandit bench train`: 64 prompts x 8 responses a GPU, 128 new tokens, a 410M Llama
shape, a value head where the algorithm needs one, a reference, a trivial reward. Numbers are medians of the steps after
the first two; `of_local` is samples/s a process over those of `local` (RLlib's 0/0 must reach 0.99). The last line is
JSON; a place that fails is told in it, and by the exit status.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from torchbandit.bench.train import Work

REWARD = """
def odd(td):
    return (td["tokens", "response"] % 2 * td["masks", "response"]).sum(-1).float()
"""


def prepare(folder: Path, work: Work) -> None:
    work.model().save_pretrained(folder / "model")
    work.tokenizer.save_pretrained(folder / "model")
    lines = [json.dumps({"prompt": text}) for text in work.texts]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "odd_reward.py").write_text(REWARD, encoding="utf-8")


def run(algo: str, place: str, folder: Path, work: Work, steps: int) -> dict[str, Any]:
    out = folder / f"{algo}_{place.replace('/', '_')}"
    command = [sys.executable, "-m", "torchbandit"]
    engine = ["--engine", "local"]
    processes = 1
    if place == "accelerate":
        processes = 2
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                   "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
                   "--main_process_port", "0", "-m", "torchbandit"]  # fmt: skip
    elif place != "local":
        runners, learners = map(int, place.split("/"))
        processes = max(1, runners)
        engine = ["--engine", "rllib", "--env-runners", str(runners), "--learners", str(learners)]
    command += ["train", *engine, "--policy", str(folder / "model"), "--prompts", str(folder / "prompts.jsonl"),
                "--reward", "odd_reward:odd", "--algo", algo, "--num-prompts", str(work.num_prompts),
                "--group-size", str(work.group_size), "--max-new-tokens", str(work.new_tokens),
                "--micro-batch-size", str(work.micro), "--lr", "1e-6", "--steps", str(steps), "--save-every", "0",
                "--out", str(out), "--num-samples", "0"]  # fmt: skip
    command += ["--device", "cpu"] if work.tiny else []
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    begin = time.perf_counter()
    log = out.with_suffix(".log")
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, stdout=file, stderr=file)
    seconds = time.perf_counter() - begin
    if code.returncode:
        return {"algo": algo, "place": place, "error": log.read_text(encoding="utf-8")[-1500:], "process_s": seconds}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(line["unscorable"] == 0 and line["grad_norm"] > 0 for line in lines)
    assert abs(lines[0]["kl"]) < 0.02 * work.new_tokens, lines[0]["kl"]
    kept = lines[2:] if len(lines) > 3 else lines
    found = {key: statistics.median(line[key] for line in kept) for key in kept[0] if key.startswith("time/")}
    per_s = statistics.median(line["samples_per_s"] for line in kept)
    first = sum(lines[0][key] for key in found)  # compiling and recording with it
    told = {"algo": algo, "place": place, "samples_per_s": per_s, "a_process": per_s / processes, "process_s": seconds}
    return told | {"first_step_s": first, **found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", nargs="+", default=["local", "0/0"])
    parser.add_argument("--algos", nargs="+", default=["ppo"])
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    work = Work(args.tiny)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), work)
        for algo, place in itertools.product(args.algos, args.places):
            rows.append(run(algo, place, Path(folder), work, args.steps))
            alone = [row for row in rows if (row["algo"], row["place"]) == (algo, "local") and "error" not in row]
            local = alone[0]["a_process"] if alone else None
            if local and "error" not in rows[-1]:
                rows[-1]["of_local"] = rows[-1]["a_process"] / local
            told = (f"{k} {v:.3f}" if isinstance(v, float) else f"{v}" for k, v in rows[-1].items())
            print("  ".join(told), flush=True)
    result = {"work": "engines", "rows": rows, "torch": torch.__version__}
    if torch.cuda.is_available():
        result["card"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    print(json.dumps(result))
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
