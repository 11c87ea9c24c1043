"""The Triton kernels against plain torch: on CUDA, or in Triton's interpreter where Triton is installed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_here import DEVICE

from torchbandit.generation import attention, fuse, gated_kernel, kernels
from torchbandit.generation.cache import keys_and_values

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


def case(n: int, K: int, H: int, D: int, L: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, a layer's cache, lanes, and the cache without its NaN: beyond a lane's length nothing is read."""
    gen = torch.Generator().manual_seed(n + L)
    query, clean = (torch.randn(*x, generator=gen).to(DEVICE, dtype) for x in ((n, K, H, D), (n + 3, L, K, 2, D)))
    place = torch.randperm(n + 2, generator=gen)[:n]
    last = torch.randint(0, L, (n,), generator=gen)
    last[0], last[-1] = 0, L - 1
    cache = clean.clone()
    cache[place[0], 1:] = float("nan")
    lanes = torch.stack((place, last), -1).int().view(n, 1, 1, 2).to(DEVICE)
    return query, cache, lanes, clean


def reference(query: Tensor, cache: Tensor, lanes: Tensor) -> Tensor:
    return attention.decode_attention(query.float(), *keys_and_values(cache.float()), lanes, 0.21)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("splits", [1, 3, None])
@pytest.mark.parametrize(("K", "H", "D"), [(2, 4, 64), (3, 1, 16), (1, 5, 80), (2, 2, 8), (1, 20, 32)])
def test_attention_equals_the_reference(K: int, H: int, D: int, splits: int | None, dtype: torch.dtype) -> None:
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter's dot takes no bfloat16")
    query, cache, lanes, clean = case(5, K, H, D, 300, dtype)
    mine = kernels.decode_attention(query, *keys_and_values(cache), lanes, 0.21, splits=splits)
    whole = reference(query, clean, lanes)
    torch.testing.assert_close(mine.float(), whole, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("splits", [1, 3, None])
@pytest.mark.parametrize(("K", "H", "D"), [(2, 4, 64), (3, 1, 16), (1, 5, 80), (2, 20, 8)])
def test_attention_writes_the_new_token_on_its_way(K: int, H: int, D: int, splits: int | None) -> None:
    query, _, lanes, want = case(5, K, H, D, 300, torch.float32)
    place, last = lanes[:, 0, 0, 0].long(), lanes[:, 0, 0, 1].long()
    joint = torch.randn(5, 1, 2 * K * D, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    key, value = (x.view(5, 1, K, D).transpose(1, 2) for x in joint.split(K * D, -1))  # slices of one product
    cache = want.clone()
    cache[place, last] = float("nan")  # the old entry is not read
    want[place, last] = torch.stack((key, value), -2)[:, :, 0]
    mine = kernels.decode_attention(query, *keys_and_values(cache), lanes, 0.21, (key, value), splits=splits)
    torch.testing.assert_close(mine, reference(query, want, lanes), rtol=2e-5, atol=2e-5)
    assert torch.equal(cache, want), "exactly the lanes' own rows are written"


@pytest.mark.parametrize("splits", [1, 3])
def test_long_lanes_read_in_large_pieces_say_the_same(splits: int) -> None:
    dtype, setting = (torch.bfloat16, None) if DEVICE == "cuda" else (torch.float32, (128, 4, 2))
    query, cache, lanes, clean = case(5, 2, 4, 64, 700, dtype)
    mine = kernels.decode_attention(query, *keys_and_values(cache), lanes, 0.21, splits=splits, setting=setting)
    whole = reference(query, clean, lanes)
    torch.testing.assert_close(mine.float(), whole, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_attention_takes_a_query_of_any_strides() -> None:
    query, _, lanes, clean = case(4, 2, 4, 16, 70, torch.float32)
    strided = query.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert strided.stride() != query.stride()
    one, two = (kernels.decode_attention(q, *keys_and_values(clean), lanes, 0.3) for q in (query, strided))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "E", "made"), [(1, 64, 128), (130, 200, 72), (1100, 72, 40), (512, 512, 384)])
def test_the_gated_product_equals_the_reference(n: int, E: int, made: int, dtype: torch.dtype) -> None:
    if (DEVICE == "cpu") != (dtype == torch.float32):
        pytest.skip("the interpreter's dot takes no bfloat16, and the kernel is for 16 bits")
    if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel is laid out for Hopper")
    gen = torch.Generator().manual_seed(n)
    x = torch.randn(n, 1, 2 * E, generator=gen).to(DEVICE, dtype)[..., :E]  # not contiguous
    weight = (torch.randn(2 * made, E, generator=gen) / E**0.5).to(DEVICE, dtype)
    whole = fuse.gated_product._init_fn(x.float(), weight.float())
    mine = gated_kernel.gated_product(x, weight)
    assert mine.shape == (n, 1, made) and mine.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(mine.float(), whole, rtol=tolerance, atol=tolerance)


def drawn(
    logits: Tensor, seed: int = 0, temperature: float = 1.0, greedy: bool = False, **at: Tensor
) -> tuple[Tensor, Tensor]:
    n = len(logits)
    zeros = torch.zeros(n, dtype=torch.int64, device=DEVICE)
    return kernels.draw(
        logits, at.get("row", torch.arange(n, device=DEVICE)), at.get("count", zeros),
        torch.tensor([seed], device=DEVICE), torch.tensor([1 / temperature], device=DEVICE), greedy=greedy,
    )  # fmt: skip


@pytest.mark.parametrize("V", [5, 1000, 4096, 20_011])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_draw_is_argmax_with_its_log_prob(V: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(7, V, generator=torch.Generator().manual_seed(V)) * 3).to(DEVICE, dtype)
    logits[2, V // 2 :] = logits[2].max()  # ties: the first wins
    tokens, log_probs = drawn(logits, greedy=True)
    assert torch.equal(tokens, logits.float().argmax(-1)) and tokens[2] <= V // 2
    expected = logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(log_probs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("V", "temperature"), [(12, 1.0), (12, 0.6), (9000, 1.0)])
def test_drawn_frequencies_pass_a_chi_square_test(V: int, temperature: float) -> None:
    n = 200_000 if DEVICE == "cuda" else 500
    logits = torch.full((V,), -4.0)
    logits[:: max(1, V // 12)] = (
        torch.randn(len(range(0, V, max(1, V // 12))), generator=torch.Generator().manual_seed(0)) + 5
    )
    logits = logits.to(DEVICE)
    tokens, log_probs = drawn(logits.expand(n, V), seed=3, temperature=temperature)
    full = (logits.double() / temperature).softmax(-1)
    torch.testing.assert_close(log_probs, full.log()[tokens].float(), rtol=1e-4, atol=1e-4)
    bins = torch.arange(V, device=DEVICE) // max(1, V // 12)
    expected = torch.zeros(int(bins.max()) + 1, dtype=torch.float64, device=DEVICE).index_add(0, bins, full) * n
    counts = bins[tokens].bincount(minlength=len(expected))
    chi_square = ((counts - expected).square() / expected).sum()
    dof = len(expected) - 1
    assert chi_square < dof + 5 * (2 * dof) ** 0.5 + 5, (chi_square, dof)


def test_noise_belongs_to_seed_row_and_token() -> None:
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0)).to(DEVICE).expand(32, 5000)
    row, count = torch.arange(32, device=DEVICE) + 100, torch.arange(32, device=DEVICE) % 5
    tokens, _ = drawn(logits, row=row, count=count)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert torch.equal(drawn(logits, row=row[order], count=count[order])[0], tokens[order])
    assert torch.equal(drawn(logits[:1], row=row[:1], count=count[:1])[0], tokens[:1])
    for other in (drawn(logits, 1, row=row, count=count), drawn(logits, row=row + 1, count=count),
                  drawn(logits, row=row, count=count + 1)):  # fmt: skip
        assert (other[0] != tokens).sum() > 16


def test_masked_logits_are_never_drawn() -> None:
    logits = torch.full((64, 5000), float("-inf"), device=DEVICE)
    logits[:, 4321] = -7.0
    tokens, log_probs = drawn(logits)
    assert (tokens == 4321).all()
    torch.testing.assert_close(log_probs, torch.zeros_like(log_probs))
