"""`torchbandit profile` on models that have learned something: trains them first, then measures. Under five minutes.

Beside the table: nf4 and bfloat16 with nothing compiled (`eager`), and for each precision which kernels the compiled
reward model spends a pass in (`kernels`, milliseconds).

    python benchmarks/gpu/precision.py --out /tmp/learned            # on one GPU
    python benchmarks/gpu/precision.py --out /tmp/learned --tiny     # a smoke test on the CPU
    python benchmarks/gpu/precision.py --out /tmp/learned --trained  # the folder holds the models already

The last line is JSON; `profile.json` and `profile.png` lie in the folder. Your own models: `torchbandit profile
--reward-model … --reference … --input pairs.jsonl`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # learned.py lies one folder up
import torch
from learned import TINY, Size, make, parser

from torchbandit.models import ModelSpec, load_reward_model, load_tokenizer
from torchbandit.profile.measure import profile
from torchbandit.profile.options import ProfileOptions
from torchbandit.profile.report import picture, table
from torchbandit.profile.rows import batches, read
from torchbandit.scoring import make_plan, sequence_scores


@torch.no_grad()
def kernels(options: ProfileOptions, precision: str) -> dict[str, float]:
    """Milliseconds of one pass over the first batch, by the dozen kernels that take most of it, and of all."""
    assert options.reward_model is not None
    quantization = None if precision == "bfloat16" else precision
    spec = ModelSpec(options.reward_model, dtype="bfloat16", quantization=quantization)  # type: ignore[arg-type]
    model = load_reward_model(spec, str(options.device))
    rows = read(options, load_tokenizer(options.reward_model))
    part = batches(rows, options.batch_size, model.device)[0]
    plan = make_plan(part[1], part[3])
    for _ in range(2):
        sequence_scores(model, *part, plan=plan)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        sequence_scores(model, *part, plan=plan)
        torch.cuda.synchronize()
    found = {f"{e.key[:90]} x {e.count}": e.self_device_time_total / 1e3 for e in trace.key_averages()}
    first = dict(sorted(found.items(), key=lambda item: -item[1])[:12])
    return {name: round(ms, 3) for name, ms in ({"all": sum(found.values())} | first).items()}


def main() -> None:
    found = parser()
    found.add_argument("--trained", action="store_true", help="skip the training")
    arguments = found.parse_args()
    out, device = arguments.out, "cpu" if arguments.tiny else "cuda"
    out.mkdir(parents=True, exist_ok=True)
    made = json.loads((out / "made.json").read_text()) if arguments.trained else make(
        out, TINY if arguments.tiny else Size(), device
    )  # fmt: skip
    accuracy = made["heldout_pair_accuracy"]
    print(f"{made['parameters']:,} parameters; {accuracy:.1%} of held-out pairs in the right order")
    if accuracy <= 0.9 and not arguments.tiny:
        raise SystemExit(f"the reward model must get more than 90% of held-out pairs right, got {accuracy:.1%}")
    options = ProfileOptions(
        str(out / "reward_model"), str(out / "sft"), input=str(out / "pairs.jsonl"), device=device,
        min_seconds=0.0 if arguments.tiny else 1.0, batch_size=64 if arguments.tiny else 2048,
    )  # fmt: skip

    def say(text: str) -> None:
        print(text, flush=True)

    result = profile(options, say) | {"made": made}
    print(table(result), flush=True)
    bare = replace(options, reference=None, baseline="bfloat16", precisions=["nf4"], compile=False)
    result["eager"] = profile(bare, say)["results"]
    print("nothing compiled:", json.dumps(result["eager"]), flush=True)
    if device == "cuda":
        result["kernels"] = {p: kernels(options, p) for p in ("bfloat16", "fp8", "nf4") if p in result["results"]}
        for precision, found in result["kernels"].items():
            print(precision, *(f"{ms:8.3f} ms  {name}" for name, ms in found.items()), sep="\n  ", flush=True)
    (out / "profile.json").write_text(json.dumps(result, indent=1) + "\n")
    picture(result, str(out / "profile.png"))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
