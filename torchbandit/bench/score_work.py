"""What the scoring benchmark scores, and what it is held against: ragged rows, padded baselines, float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchbandit.bench.frame import Frame, Times
from torchbandit.bench.models import SHAPES, llama
from torchbandit.scoring import Plan
from torchbandit.scoring.last_layer import WORTH_BELOW

Args = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass
class Run:
    """The frame, as the rows use it."""

    frame: Frame
    own: dict[str, float] = field(default_factory=dict)
    last: Times = field(default_factory=lambda: Times(0.0, 0.0, 0.0))

    @property
    def device(self) -> torch.device:
        return self.frame.device

    @property
    def dtype(self) -> torch.dtype:
        return self.frame.dtype

    @property
    def tiny(self) -> bool:
        return self.frame.tiny

    @property
    def matmul(self) -> float:
        return self.frame.limits()["matmul_flop_s"]

    def shape(self, name: str) -> dict[str, int]:
        return SHAPES["tiny" if self.tiny else name]

    def rows(self, n: int) -> int:
        return min(n, 16) if self.tiny else n

    def own_matmul(self, shape: str) -> float:
        """FLOP a second of the matrix products of one layer of this shape, over as many tokens as a pack holds."""
        if shape not in self.own:
            c = self.shape(shape)
            hidden, head = c["hidden_size"], c["hidden_size"] // c["num_attention_heads"]
            products = [(hidden, hidden), (hidden, c["num_key_value_heads"] * head)] * 2
            products += [(hidden, c["intermediate_size"])] * 2 + [(c["intermediate_size"], hidden)]
            self.own[shape] = self.frame.matmul(products, 256 if self.tiny else 32768)
        return self.own[shape]

    def micro(self, what: str) -> int:
        return int(self.frame.setting("transformers", f"micro_batch_{what}"))

    def sync(self) -> None:
        self.frame.wait()

    def time(self, work: Callable[[], Any], repeats: int = 3, warm: int = 1) -> float:
        """Median seconds; the spread is kept in `last`."""
        self.last = self.frame.time(work, repeats, warm)
        return self.last.median

    def peak(self, work: Callable[[], Any]) -> float:
        """GB above what was allocated before."""
        return self.frame.peak_gb(work)


def build(run: Run, shape: str, kind: type[PreTrainedModel], compile: bool, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = llama("tiny" if run.tiny else shape, pad_token_id=0, num_labels=1)
    config._attn_implementation = run.frame.setting("transformers", "attention")
    with torch.device(run.device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(run.dtype)
        try:
            model: Any = kind(config)
        finally:
            torch.set_default_dtype(default)
    compile_layers(model, compile)
    made: PreTrainedModel = model.eval().requires_grad_(False)
    return made


def compile_layers(model: Any, yes: bool) -> None:
    """Whether scoring compiles this model's decoder layers."""
    model.torchbandit_compile = yes


def ragged(run: Run, num: int, group_size: int = 1, prompt: int | None = None, reply: int | None = None) -> Args:
    """Left-padded prompts and right-padded responses; fixed lengths where they are given."""
    gen = torch.Generator().manual_seed(0)

    def lengths(n: int, mean: float, std: float, low: int, high: int, fixed: int | None) -> Tensor:
        if fixed is not None:
            return torch.full((n,), min(fixed, 24) if run.tiny else fixed)
        drawn = (torch.randn(n, generator=gen) * std + mean).exp().long().clamp(low, high)
        return (drawn // 16).clamp(min=1) if run.tiny else drawn

    p = lengths(num // group_size, 4.8, 0.6, 16, 512, prompt).repeat_interleave(group_size)
    r = lengths(num, 5.3, 0.8, 8, 1024, reply)
    vocab = run.shape("1b")["vocab_size"] if run.tiny else 32000
    prompts = torch.randint(1, vocab, (num // group_size, int(p.max())), generator=gen).repeat_interleave(group_size, 0)
    replies = torch.randint(1, vocab, (num, int(r.max())), generator=gen)
    tensors = (
        prompts, torch.arange(prompts.shape[1]) >= (prompts.shape[1] - p)[:, None],
        replies, torch.arange(replies.shape[1]) < r[:, None],
    )  # fmt: skip
    return tuple(x.to(run.device) for x in tensors)  # type: ignore[return-value]


def tokens_of(args: Args) -> int:
    return int(args[1].sum() + args[3].sum())


def body_size(model: Any) -> int:
    """Weights of the decoder layers."""
    return sum(p.numel() for layer in model.base_model.layers for p in layer.parameters())


def flops(model: PreTrainedModel, args: Args, head_tokens: int = 0, *, last: float = 1.0) -> float:
    """Of a forward pass: two a weight and token in the layers, attention, and the head where it is asked for.

    Args:
        last: share of the tokens for which the last layer is needed behind its attention.
    """
    body: Any = model.base_model
    layer = body.layers[-1]
    behind: int = sum(p.numel() for module in (layer.self_attn.o_proj, layer.mlp) for p in module.parameters())
    lengths = (args[1].sum(1) + args[3].sum(1)).double()
    config: Any = model.config
    attention = 2 * int(config.num_attention_heads * config.head_dim * config.num_hidden_layers)
    head = head_tokens * int(config.hidden_size * config.vocab_size)
    layers: float = (body_size(model) - (1 - last) * behind) * tokens_of(args)
    return 2.0 * layers + attention * float((lengths**2).sum()) + 2.0 * head


def last_layer_share(plan: Plan, read: Literal["predict", "last"]) -> float:
    """Share of the tokens for which scoring without gradient runs the last layer behind its attention."""
    done = whole = 0
    for pack in plan.packed():
        tokens, wanted = pack.source.numel(), getattr(pack, read).shape[0]
        done += wanted if wanted <= WORTH_BELOW * tokens else tokens
        whole += tokens
    return done / whole


def unpadded(args: Args, row: int) -> Tensor:
    return torch.cat((args[0][row][args[1][row]], args[2][row][args[3][row]]))


class Padded:
    """transformers as people call it: right-padded microbatches with an attention mask, trimmed to their longest."""

    def __init__(self, args: Args, sort: bool, micro_batch: int) -> None:
        lengths = (args[1].sum(1) + args[3].sum(1)).tolist()
        order = sorted(range(len(lengths)), key=lengths.__getitem__) if sort else list(range(len(lengths)))
        self.batches = []
        for begin in range(0, len(order), micro_batch):
            rows = order[begin : begin + micro_batch]
            lines = [unpadded(args, row) for row in rows]
            ids = nn.utils.rnn.pad_sequence(lines, batch_first=True)
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in lines], batch_first=True)
            starts = torch.tensor([int(args[1][row].sum()) for row in rows], device=ids.device)
            ends = torch.tensor([len(x) for x in lines], device=ids.device)
            self.batches.append((rows, ids, mask, starts, ends))

    def scores(self, model: PreTrainedModel) -> Tensor:
        out = torch.empty(sum(len(b[0]) for b in self.batches), device=self.batches[0][1].device)
        for rows, ids, mask, _, _ in self.batches:
            out[rows] = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].float()
        return out

    def log_probs(self, model: PreTrainedModel, backward: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Full logits, float32 log-softmax a row; [B] sums over responses."""
        out = torch.empty(sum(len(b[0]) for b in self.batches), device=self.batches[0][1].device)
        for rows, ids, mask, starts, ends in self.batches:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            at = torch.arange(ids.shape[1] - 1, device=ids.device)
            real = (at >= starts[:, None] - 1) & (at < ends[:, None] - 1)
            logps = torch.stack([
                row.float().log_softmax(-1).gather(1, target[:, None]).squeeze(1)
                for row, target in zip(logits[:, :-1], ids[:, 1:], strict=True)
            ])  # fmt: skip
            total = torch.where(real, logps, 0.0).sum(1)
            if backward is not None:
                backward(total)
            out[rows] = total.detach()
        return out


def check(name: str, got: Tensor, want: Tensor, reference: Tensor | None) -> dict[str, float]:
    """`got` may be no further from float32 `reference` than twice what the padded baseline `want` is, and 10%.

    Without a reference the two 16-bit results are compared with each other. Distances are root mean squares, in
    standard deviations over the rows.
    """
    exact = want if reference is None else reference
    scale = exact.float().std() + 1e-6
    ours, theirs = (float((x.float() - exact.float()).square().mean().sqrt() / scale) for x in (got, want))
    if not ours <= 2 * theirs + (0.3 if reference is None else 0.1):
        raise AssertionError(
            f"{name}: off by {ours:.3g} std from the reference, where the baseline is off by {theirs:.3g}"
        )
    return {"error_std": round(ours, 5), "baseline_error_std": round(theirs, 5)}


def exact_scores(model: PreTrainedModel, args: Args, rows: list[int]) -> Tensor:
    """A float32 copy of the model, one row at a time, unpadded."""
    exact = _float32(model)
    with torch.no_grad():
        return torch.stack([exact(unpadded(args, row)[None]).logits[0, 0] for row in rows])


def exact_log_probs(model: PreTrainedModel, args: Args, rows: list[int]) -> Tensor:
    exact, out = _float32(model), []
    with torch.no_grad():
        for row in rows:
            ids, start = unpadded(args, row), int(args[1][row].sum())
            logits = exact(ids[None], logits_to_keep=len(ids) - start + 1).logits[0, :-1]
            out.append(logits.log_softmax(-1).gather(1, ids[start:, None]).sum())
    return torch.stack(out)


def _float32(model: PreTrainedModel) -> PreTrainedModel:
    exact: PreTrainedModel = copy.deepcopy(model).float()
    compile_layers(exact, False)
    return exact
