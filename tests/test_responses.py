"""Where responses end, against the same told row by row."""

from __future__ import annotations

import pytest
import torch

from torchbandit.responses import any_row, has_stopped, is_contiguous, is_left_padded, is_stop, lengths, stop_mask


def masks(rows: int = 200, width: int = 6) -> torch.Tensor:
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(0)) < 0.6


@pytest.mark.parametrize("stops", [[], [3], [3, 7], list(range(3, 15)), [14, 3, 9, 9, 19, 0, 12, 7, 5, 1]])
def test_stop_ids_as_list_and_as_tensor(stops: list[int]) -> None:
    tokens = torch.randint(0, 20, (50, 6), generator=torch.Generator().manual_seed(0))
    expected = [[token in stops for token in row] for row in tokens.tolist()]
    assert is_stop(tokens, stops).tolist() == expected
    assert is_stop(tokens, torch.tensor(stops, dtype=torch.int64)).tolist() == expected


def test_any_row_and_lengths() -> None:
    mask = masks()
    assert any_row(mask).tolist() == [any(row) for row in mask.tolist()]
    assert any_row(mask[:, 2:5]).tolist() == [any(row) for row in mask[:, 2:5].tolist()], "a view with strides"
    assert any_row(mask[:, :0]).tolist() == [False] * len(mask)
    assert lengths(mask).tolist() == [sum(row) for row in mask.tolist()] and lengths(mask).dtype == torch.int64


def test_runs() -> None:
    rows = masks().tolist()
    assert is_contiguous(masks()).tolist() == [row == sorted(row, reverse=True) for row in rows]
    assert is_left_padded(masks()).tolist() == [row == sorted(row) for row in rows]
    assert is_contiguous(torch.zeros(2, 1, dtype=torch.bool)).tolist() == [True, True]


def test_finished_is_told_by_the_last_real_token() -> None:
    """A stop token that an engine ran on from is no end, and what stands after the mask does not count."""
    tokens = torch.tensor([[1, 9, 0, 0], [1, 2, 3, 4], [9, 2, 3, 4], [9, 9, 9, 9], [1, 2, 3, 9]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
    assert has_stopped(tokens, mask, [9]).tolist() == [True, False, False, False, False]
    assert has_stopped(tokens, mask, torch.tensor([4, 9])).tolist() == [True, True, True, False, False]
    assert has_stopped(tokens[:, :0], mask[:, :0], [9]).tolist() == [False] * 5
    assert stop_mask(tokens, [9])[0].tolist() == [True, True, False, False]
