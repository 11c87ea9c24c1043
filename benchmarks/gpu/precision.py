"""`torchbandit profile` on models that have learned something: trains them first, then measures. Under five minutes.

    python benchmarks/gpu/precision.py --out /tmp/learned            # on one GPU
    python benchmarks/gpu/precision.py --out /tmp/learned --tiny     # a smoke test on the CPU
    python benchmarks/gpu/precision.py --out /tmp/learned --trained  # the folder holds the models already

The last line is JSON; `profile.json` and `profile.png` lie in the folder. Your own models: `torchbandit profile
--reward-model … --reference … --input pairs.jsonl`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # learned.py lies one folder up
from learned import TINY, Size, make, parser

from torchbandit.profile.measure import profile
from torchbandit.profile.options import ProfileOptions
from torchbandit.profile.report import picture, table


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
        min_seconds=0.0 if arguments.tiny else 2.0,
    )  # fmt: skip
    result = profile(options, say=lambda text: print(text, flush=True)) | {"made": made}
    print(table(result))
    (out / "profile.json").write_text(json.dumps(result, indent=1) + "\n")
    picture(result, str(out / "profile.png"))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
