"""The demo task through RLlib: `python benchmarks/rllib_demo.py [--only 2/1] [--dtypes float32 bfloat16]`.

For each runners/learners and dtype the whole demo run of `torchbandit train --engine rllib`, with the same rows an
iteration, judged as the standalone loop is: the reward model's mean score on held-out prompts must rise by 1.5 standard
deviations of the SFT model's scores, with less than 10 nats of KL. Prints a table and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from torchbandit.rllib.run import train
from torchbandit.train.options import TrainOptions, demo_defaults

PLACES = ("0/0", "2/0", "2/1", "2/2")


def run(place: str, dtype: str, steps: int | None, out: Path) -> dict[str, Any]:
    """One run and its verdict."""
    runners, learners = map(int, place.split("/"))
    settings = demo_defaults()
    settings |= {} if steps is None else {"steps": steps}
    settings["num_prompts"] //= max(1, runners)
    settings |= dict(engine="rllib", env_runners=runners, learners=learners, dtype=dtype, out=str(out))
    options = TrainOptions(**settings)
    started = time.perf_counter()
    train(options)
    seconds = time.perf_counter() - started
    told = json.loads((out / "evaluation.json").read_text())
    before, after = told["before"]["metrics"], told["after"]["metrics"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    times = {key: sum(line[key] for line in lines) / len(lines) for key in lines[0] if key.startswith("time/")}
    return {
        "place": place,
        "dtype": dtype,
        "rise": (after["reward_model"] - before["reward_model"]) / before["reward_model_std"],
        "kl": after["kl"],
        "lm_loss_change": after["lm_loss"] / before["lm_loss"] - 1,
        "seconds": seconds,
        **times,
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PLACES, default=PLACES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, help="fewer than the demo's, for a quick look")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in arguments.dtypes:
            for place in arguments.only:
                found.append(run(place, dtype, arguments.steps, Path(folder) / f"{place.replace('/', '-')}-{dtype}"))
    print(f"\n{'run/learn':>9} {'dtype':>9} {'rise (sd)':>9} {'KL':>6} {'lm loss':>8} {'total s':>8}   verdict")
    for one in found:
        one["met"] = one["rise"] >= 1.5 and one["kl"] < 10
        print(
            f"{one['place']:>9} {one['dtype']:>9} {one['rise']:9.2f} {one['kl']:6.2f} {one['lm_loss_change']:+8.1%} "
            f"{one['seconds']:8.0f}   {'met' if one['met'] else 'missed'}"
        )
    print(json.dumps({"benchmark": "rllib_demo", "runs": found}))


if __name__ == "__main__":
    main()
