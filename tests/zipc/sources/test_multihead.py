"""Torch's attention with linear maps of its own computes what it computed before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.zoo import torch_text
from zipc.core.errors import UnsupportedModel
from zipc.sources.multihead import Attention, part_attention_, parts_of

SIZE, HEADS = 8, 2
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 5, [False, False, False, True, True]])


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("made", [{}, {"bias": False}, {"kdim": 6, "vdim": 4}])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
        {"attn_mask": CAUSAL},
        {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
        {"key_padding_mask": PADDING},
        {"key_padding_mask": PADDING.double() * -9, "attn_mask": CAUSAL.double() * -9},
    ],
)
def test_outputs_and_weights_are_those_of_torch(
    made: dict[str, Any], batch_first: bool, given: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(SIZE, HEADS, batch_first=batch_first, **made).double().eval()
    query = noise(2, 5, SIZE)
    key, value = noise(2, 5, made.get("kdim", SIZE)), noise(2, 5, made.get("vdim", SIZE))
    feeds = [x if batch_first else x.transpose(0, 1) for x in (query, key, value)]
    with torch.no_grad():
        for want, got in zip(
            theirs(*feeds, **given), Attention(theirs)(*feeds, **given), strict=True
        ):
            assert (want is None) == (got is None)
            if want is not None:
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_a_single_sequence_will_do() -> None:
    theirs = nn.MultiheadAttention(SIZE, HEADS).double().eval()
    x = noise(5, SIZE)
    with torch.no_grad():
        for want, got in zip(
            theirs(x, x, x, PADDING[1]), Attention(theirs)(x, x, x, PADDING[1]), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_a_mask_for_every_head_is_refused() -> None:
    theirs = nn.MultiheadAttention(SIZE, HEADS).eval()
    x = torch.zeros(5, 1, SIZE)
    with pytest.raises(UnsupportedModel, match="every head"):
        Attention(theirs)(x, x, x, attn_mask=torch.zeros(HEADS, 5, 5))


def test_whole_models_give_the_same_and_a_shared_module_stays_one() -> None:
    feeds, whole = torch_text.pairs(), torch_text.EncoderDecoder().double().eval()
    with torch.no_grad():
        want = whole(**feeds)
        part_attention_(whole, list(parts_of(whole)))
        for got, expected in zip(whole(**feeds), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    twice = nn.ModuleList([shared := nn.MultiheadAttention(SIZE, HEADS), shared])
    part_attention_(twice, ["0", "1"])
    assert twice[0] is twice[1]
    assert isinstance(twice[0], Attention)


def test_what_it_cannot_stand_for_is_left() -> None:
    hooked = nn.MultiheadAttention(SIZE, HEADS)
    hooked.register_forward_hook(lambda *_: None)
    odd = nn.ModuleList(
        [
            hooked,
            nn.MultiheadAttention(SIZE, HEADS, add_bias_kv=True),
            nn.MultiheadAttention(SIZE, HEADS, add_zero_attn=True),
            nn.MultiheadAttention(SIZE, HEADS),
        ]
    )
    assert list(parts_of(odd)) == ["3"]
