"""Prompts on a GPU: no sync in a draw, and the same draws as on a CPU."""

from __future__ import annotations

import pytest
import torch
from fakes import byte_tokenizer

from torchbandit.prompts import PromptSet, PromptStream

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    "rows", [[[1, 2], [3], [4, 5]], [[i] for i in range(20)] + [list(range(99))]], ids=["dense", "flat"]
)
def test_draws_make_no_sync_and_equal_those_of_a_cpu(rows):
    prompts = PromptSet.from_tokens(rows, tokenizer=byte_tokenizer(), columns={"x": list(range(len(rows)))})
    on_gpu = prompts.to("cuda")
    stream, twin = PromptStream(on_gpu, seed=4), PromptStream(prompts, seed=4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = [stream.next(2) for _ in range(2 * len(rows))]  # several epochs, so several permutations are copied
        gathered = [on_gpu.gather(prompt_id) for prompt_id, _ in drawn]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (prompt_id, group_id), (ids, mask, columns) in zip(drawn, gathered, strict=True):
        want_id, want_group = twin.next(2)
        want_ids, want_mask, want_columns = prompts.gather(want_id)
        for got, want in (
            (prompt_id, want_id),
            (group_id, want_group),
            (ids, want_ids),
            (mask, want_mask),
            (columns["x"], want_columns["x"]),
        ):
            assert got.is_cuda
            torch.testing.assert_close(got.cpu(), want)
