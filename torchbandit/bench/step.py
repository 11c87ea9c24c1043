"""`torchbandit bench step`: env.reset and env.step with a function reward, beside the bare tensors and ChatEnv."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchbandit import batch
from torchbandit.bench.frame import Frame, Line, Peer, keep_heap, one_thread
from torchbandit.bench.models import word_tokenizer
from torchbandit.env import BanditEnv
from torchbandit.prompts import PromptSet

GROUP = 8


def response_length(td: TensorDictBase) -> Tensor:
    """The reward of this benchmark."""
    mask: Tensor = td[batch.RESPONSE_MASK]
    return mask.sum(-1).float()


class Work:
    """Prompts of 97 to 128 tokens in groups of 8, ready responses of 1 to 128 tokens: the end-to-end row's widths."""

    def __init__(self, rows: int, device: torch.device, width: int = 128) -> None:
        gen = torch.Generator().manual_seed(0)
        self.rows, self.device, num = rows, device, max(rows, 2048)
        lengths = torch.randint(width * 3 // 4 + 1, width + 1, (num,), generator=gen)
        self.tokens = [torch.randint(3, 1000, (n,), generator=gen).tolist() for n in lengths.tolist()]
        self.prompts = PromptSet.from_tokens(self.tokens, tokenizer=word_tokenizer(1000)).to(device)
        self.response = torch.randint(3, 1000, (rows, width), generator=gen).to(device)
        ends = torch.randint(1, width + 1, (rows, 1), generator=gen)
        self.mask = (torch.arange(width) < ends).to(device)
        self.env = BanditEnv(
            self.prompts, response_length, num_prompts=rows // GROUP, group_size=GROUP, device=device, packing=False
        )
        self.ids, self.real, _ = self.prompts.gather(torch.arange(num, device=device))
        self.order = torch.randperm(num, generator=gen).to(device)
        self.drawn = 0

    def ours(self) -> TensorDict:
        td = self.env.reset()
        td.set(batch.RESPONSE, self.response)
        td.set(batch.RESPONSE_MASK, self.mask)
        return self.env.step(td)

    def bare(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same index, gather and reward, of tensors as a script would hold them."""
        num = self.rows // GROUP
        prompt_id = self.order[self.drawn : self.drawn + num].repeat_interleave(GROUP, output_size=self.rows)
        self.drawn = (self.drawn + num) % (len(self.order) - num)
        return prompt_id, self.ids[prompt_id], self.real[prompt_id], self.mask.sum(-1).float()

    def check(self) -> None:
        """Ours must be what the bare tensors are, for the prompts it drew."""
        td = self.ours()
        torch.testing.assert_close(td[batch.PROMPT], self.ids[td[batch.PROMPT_ID]])
        torch.testing.assert_close(td[batch.PROMPT_MASK], self.real[td[batch.PROMPT_ID]])
        torch.testing.assert_close(td[batch.REWARD].squeeze(-1), self.bare()[-1])
        drawn = td[batch.PROMPT_ID][::GROUP]
        assert len(drawn.unique()) == self.rows // GROUP, "a prompt was drawn twice in an epoch"
        assert bool((td[batch.PROMPT_ID].view(-1, GROUP) == drawn[:, None]).all()), "siblings are not contiguous"

    def least_bytes(self) -> int:
        """Read and written at the least: the prompts and their mask, the response mask."""
        return self.ids[: self.rows].nbytes * 2 + self.real[: self.rows].nbytes * 2 + self.mask.nbytes


def run(frame: Frame) -> None:
    with one_thread():
        measure(frame, torch.device("cpu"))
    if frame.cuda:
        measure(frame, frame.device)
    else:
        frame.leave_out("step on a GPU", "no CUDA device")


def measure(frame: Frame, device: torch.device) -> None:
    cpu = device.type == "cpu"
    where = "CPU, one thread" if cpu else "GPU"
    kept = cpu and keep_heap()
    a_row: dict[int, float] = {}
    copy_rate = frame.copy_rate(device)
    for rows in (64, 256) if frame.tiny else (1024, 4096, 16384):
        work = Work(rows, device, 16 if frame.tiny else 128)
        work.check()
        took = frame.alternate({"ours": work.ours, "bare": work.bare}, device=device, repeats=60)
        ours, bare = took["ours"], took["bare"]
        a_row[rows] = ours.median / rows
        line = Line(
            "step", f"reset + step, {rows} rows, {where}", rows / ours.median, "rows/s", rows / ours.high,
            rows / ours.low, peak_gb=frame.peak_gb(work.ours, device), host_syncs=frame.host_syncs(work.ours),
        )  # fmt: skip
        line.percent, line.ceiling = 100 * work.least_bytes() / copy_rate / ours.median, "the copy bandwidth"
        line.more["over the bare index, gather and reward tensors"] = ours.median / bare.median
        line.more["us a row"] = a_row[rows] * 1e6
        line.more["us a row over that of the fewest rows"] = a_row[rows] / next(iter(a_row.values()))
        if cpu:
            line.notes.append(
                "the thread's own seconds; "
                + ("freed memory is kept (mallopt), for both sides" if kept else "malloc as it is")
            )
            if rows <= frame.setting("chatenv", "max_rows"):
                add_chat_env(frame, line, work)
        frame.add(line)


def add_chat_env(frame: Frame, line: Line, work: Work) -> None:
    """TorchRL's ChatEnv on the same prompts and responses, as strings."""
    if not frame.has("chatenv", "step"):
        return
    for mode in frame.setting("chatenv", "input_modes"):
        call = chat_env(mode, work)
        took = frame.alternate({mode: call}, device=torch.device("cpu"), repeats=3, warm=1)[mode]
        rate = work.rows / took.median
        line.peers.append(Peer(f"ChatEnv ({mode})", rate, line.rate / rate))
    line.notes.append(
        "ChatEnv does more: it keeps chat histories, as objects of strings, and applies the chat template; and less: "
        "its rows get no reward here"
    )


def chat_env(mode: str, work: Work) -> Callable[[], Any]:
    from torchrl.data.llm import History
    from torchrl.envs.llm import ChatEnv

    tokenizer = work.prompts.tokenizer
    texts = [tokenizer.decode(work.tokens[i // GROUP]) for i in range(work.rows)]
    lengths = work.mask.sum(-1).tolist()
    replies = [tokenizer.decode(ids[:n]) for ids, n in zip(work.response.tolist(), lengths, strict=True)]
    env = ChatEnv(batch_size=(work.rows,), input_mode=mode, tokenizer=tokenizer)
    roles = [["assistant"]] * work.rows

    def call() -> Any:
        td = env.reset(TensorDict({"query": texts}, batch_size=[work.rows]))
        if mode == "history":
            reply = History(role=roles, content=[[text] for text in replies], batch_size=[work.rows, 1])
            td["history"].full = td["history"].prompt.extend(reply, inplace=False, dim=-1)
        else:
            td["text"].full = [a + b for a, b in zip(td["text"].prompt, replies, strict=True)]
        return env.step(td)

    out = call()["next", mode]
    last = out.prompt[-1]
    said = last[-1].content if mode == "history" else last
    assert said.endswith(replies[-1]), f"ChatEnv ({mode}) lost the reply"
    return call
