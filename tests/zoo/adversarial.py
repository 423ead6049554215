"""Graphs on which a naive tool is silently wrong: the right answer is exact, or to leave it alone.

Most have one form: a convolution with ReLU, something treacherous, and a convolution that reads it.
`SOLVABLE` names those in which a careful tool does find something to remove.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo import Family
from tests.zoo.values import images, ready
from tests.zoo.vision import shuffle

WIDTH = 8


class Trap(nn.Module):
    """Convolution, ReLU, `trap`, convolution over `after` channels, mean, linear."""

    after = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv2d(self.after, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def trap(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.trap(F.relu(self.conv1(x)))
        logits: Tensor = self.head(F.relu(self.conv2(x)).mean((2, 3)))
        return logits


# ---------------------------------------------------------------- another order of channels


class ReshapeMixes(Trap):
    """Pairs of channels become one channel of twice the height."""

    after = WIDTH // 2

    def trap(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        return x.reshape(batch, channels // 2, 2 * height, width)


class SpaceBecomesChannels(Trap):
    """A transpose swaps channels and columns (both are 8) and nothing in the shapes tells."""

    def trap(self, x: Tensor) -> Tensor:
        return x.transpose(1, 3)


class Shuffled(Trap):
    """Two groups are interleaved: channel 1 comes from unit 4."""

    def trap(self, x: Tensor) -> Tensor:
        return shuffle(x, groups=2)


class Rolled(Trap):
    """Shifted by three: removing a unit and shifting do not commute."""

    def trap(self, x: Tensor) -> Tensor:
        return torch.roll(x, 3, dims=1)


class Flipped(Trap):
    """Unit i is read by column 7 - i."""

    def trap(self, x: Tensor) -> Tensor:
        return torch.flip(x, dims=(1,))


class Permuted(Trap):
    """Indexed by a constant that names one unit twice and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([3, 0, 5, 5, 1, 7, 2, 6]))

    def trap(self, x: Tensor) -> Tensor:
        return x[:, self.order]


class PixelShuffled(Trap):
    """Four units in a row make one channel of twice the size."""

    after = WIDTH // 4

    def trap(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(x, 2)


class PixelUnshuffled(Trap):
    """One unit makes four channels in a row."""

    after = 4 * WIDTH

    def trap(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, 2)


class Interleaved(Trap):
    """The halves are stacked behind the channel axis: unit i goes to 2i or to 2(i - 4) + 1."""

    def trap(self, x: Tensor) -> Tensor:
        return torch.stack(x.chunk(2, dim=1), dim=2).flatten(1, 2)


# ---------------------------------------------------------------- parts and copies of the channels


class FirstHalf(Trap):
    """Half of the units are never read."""

    after = WIDTH // 2

    def trap(self, x: Tensor) -> Tensor:
        return x[:, : WIDTH // 2]


class EverySecond(Trap):
    """A slice with a step."""

    after = WIDTH // 2

    def trap(self, x: Tensor) -> Tensor:
        return x[:, ::2]


class GatedByFirst(Trap):
    """Unit 0 scales all others."""

    def trap(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x[:, :1])


class TwiceConcatenated(Trap):
    """Unit i is read by the columns i and 8 + i."""

    after = 2 * WIDTH

    def trap(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], dim=1)


class RepeatedInPlace(Trap):
    """Unit i is read by the columns 2i and 2i + 1."""

    after = 2 * WIDTH

    def trap(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(2, dim=1)


class HalvesAdded(Trap):
    """The units i and 4 + i go together or not at all."""

    after = WIDTH // 2

    def trap(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return a + b


class HalvesGated(Trap):
    """One half is the gate of the other."""

    after = WIDTH // 2

    def trap(self, x: Tensor) -> Tensor:
        return F.glu(x, dim=1)


class UnevenSplit(Trap):
    """Three parts, of which two are concatenated in another order."""

    after = WIDTH - 2

    def trap(self, x: Tensor) -> Tensor:
        a, b, c = x.split((3, 2, 3), dim=1)
        return torch.cat([c + a, a], dim=1) * b.mean(1, keepdim=True)


class WritesIntoSlice(Trap):
    """Two channels are overwritten by a third."""

    def trap(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 2:4] = x[:, 5:6]
        return y


# ---------------------------------------------------------------- across the channels


class ChannelSoftmax(Trap):
    """A zeroed unit still takes its share."""

    def trap(self, x: Tensor) -> Tensor:
        return x.softmax(1)


class ChannelCumsum(Trap):
    """Every channel holds the sum of those before it."""

    def trap(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class ChannelSum(Trap):
    """Read as a sum, which bears removal, beside the units themselves."""

    after = WIDTH + 1

    def trap(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.sum(1, keepdim=True)], dim=1)


class ChannelMean(Trap):
    """Removing a unit changes the divisor."""

    def trap(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class ChannelMax(Trap):
    """Without ReLU the largest of the others may be below zero."""

    after = 1

    def trap(self, x: Tensor) -> Tensor:
        return (x - 1).amax(1, keepdim=True)


class NormPerChannel(Trap):
    """Each channel by its own norm, which stands at every position."""

    def trap(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        return F.relu(torch.divide(x, norm.clamp_min(1e-3).expand_as(x)))


class ShapedLikeAnother(Trap):
    """A shape and a type are taken from other tensors, one of them larger than what it types."""

    def trap(self, x: Tensor) -> Tensor:
        half = torch.sqrt(torch.tensor(0.25)).type_as(x)
        return F.relu(x.flatten(1).reshape_as(x) * half)


class ChannelSort(Trap):
    """Which unit a column reads depends on the data."""

    def trap(self, x: Tensor) -> Tensor:
        return x.sort(dim=1).values


class ChannelNormalised(Trap):
    """Divided by the norm over the channels, which bears removal."""

    def trap(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)


class ChannelLayerNorm(Trap):
    """LayerNorm over channels and positions at once."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((WIDTH, 8, 8))

    def trap(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y


class MixedByEinsum(Trap):
    """A linear map of the channels that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.empty(WIDTH, WIDTH))

    def trap(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,cd->bdhw", x, self.mix)


class OuterProduct(Trap):
    """A channel for every pair of units."""

    after = WIDTH * WIDTH

    def trap(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(1) * x.unsqueeze(2)).flatten(1, 2)


class ChannelAttention(Trap):
    """Channels attend to channels: both axes of the scores are the units."""

    def trap(self, x: Tensor) -> Tensor:
        rows = x.flatten(2)
        scores = (rows @ rows.transpose(1, 2) / 8).softmax(-1)
        return (scores @ rows).view_as(x)


class WidthAsNumber(Trap):
    """The number of channels is a factor: after surgery the same code divides by another."""

    def trap(self, x: Tensor) -> Tensor:
        return x * (4 / x.shape[1])


@torch.library.custom_op("zoo::unheard_of", mutates_args=())
def unheard_of(x: Tensor) -> Tensor:
    """Looks element-wise from outside, and swaps neighbouring channels."""
    pairs = x.unflatten(1, (-1, 2)).flip(2)
    return pairs.flatten(1, 2).clone()


@unheard_of.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


unheard_of.register_autograd(lambda _, gradient: unheard_of(gradient))


class UnknownOp(Trap):
    """An operation that nobody knows, of which only the shape is told."""

    def trap(self, x: Tensor) -> Tensor:
        y: Tensor = unheard_of(x)
        return y


# ---------------------------------------------------------------- values per channel


class AddedPerChannel(Trap):
    """A zeroed unit comes out as the parameter that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.empty(1, WIDTH, 1, 1))

    def trap(self, x: Tensor) -> Tensor:
        return x + self.shift


class BufferPerChannel(Trap):
    """A constant per channel that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 1.5, WIDTH), persistent=False)

    def trap(self, x: Tensor) -> Tensor:
        return x * self.scale[:, None, None]


class BranchOnBuffer(Trap):
    """A branch that depends on a value, which torch.export does not follow; torch.fx does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("doubled", torch.tensor(1))

    def trap(self, x: Tensor) -> Tensor:
        return 2 * x if self.doubled > 0 else x


class PReluPerChannel(Trap):
    """A slope per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.PReLU(WIDTH)

    def trap(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(x - 0.5)
        return y


class DepthMultiplier(Trap):
    """A depthwise filter with two outputs per unit."""

    after = 2 * WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.depth = nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1, groups=WIDTH)

    def trap(self, x: Tensor) -> Tensor:
        return F.relu(self.depth(x))


class GroupedUneven(Trap):
    """Two groups of four inputs and three outputs."""

    after = 6

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(WIDTH, 6, 1, groups=2)

    def trap(self, x: Tensor) -> Tensor:
        return F.relu(self.grouped(x))


class TransposedGrouped(Trap):
    """A transposed filter in groups: its weight is (in, out / groups, 2, 2)."""

    after = 4

    def __init__(self) -> None:
        super().__init__()
        self.grow = nn.ConvTranspose2d(WIDTH, 4, 2, stride=2, groups=2)

    def trap(self, x: Tensor) -> Tensor:
        return F.relu(self.grow(x))


# ---------------------------------------------------------------- weights


class SameModuleTwice(Trap):
    """One convolution after itself: its inputs are its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def trap(self, x: Tensor) -> Tensor:
        return F.relu(self.again(F.relu(self.again(x))))


class SameModuleApart(nn.Module):
    """One convolution on two inputs: what reads its outputs reads two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.right = nn.Conv2d(3, WIDTH, 1)
        self.shared = nn.Conv2d(WIDTH, 6, 3, padding=1)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.shared(F.relu(self.left(x))))
        b = F.relu(self.shared(F.relu(self.right(x))))
        logits: Tensor = self.head(torch.cat([a, b], dim=1).mean((2, 3)))
        return logits


class TiedModules(Trap):
    """Two modules hold one weight; only one of them stands at the trap."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(WIDTH, WIDTH, 1)
        self.second = nn.Conv2d(WIDTH, WIDTH, 1)
        self.second.weight = self.first.weight

    def trap(self, x: Tensor) -> Tensor:
        return F.relu(self.second(torch.tanh(self.first(x))))


class TiedTransposed(nn.Module):
    """An autoencoder whose decoder is the encoder's matrix transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(24, WIDTH)
        self.bias = nn.Parameter(torch.empty(24))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.encoder(x.mean(2).flatten(1)))
        return F.linear(hidden, self.encoder.weight.t(), self.bias)


class StandardisedWeight(Trap):
    """The filters are standardised over their inputs before they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def trap(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(self.raw.weight, (1, 2, 3), keepdim=True)
        return F.relu(F.conv2d(x, (self.raw.weight - mean) / std / 6, self.raw.bias, padding=1))


# ---------------------------------------------------------------- readers


class WrongFlatten(nn.Module):
    """Flattened with the channels last: a unit is every eighth column."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3, stride=2, padding=1)
        self.head = nn.Linear(16 * WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.conv(x)).permute(0, 2, 3, 1).flatten(1))
        return logits


class ManyReaders(nn.Module):
    """A convolution, a linear layer over means and one over everything read the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3, stride=2, padding=1)
        self.next = nn.Conv2d(WIDTH, 5, 3, padding=1)
        self.means = nn.Linear(WIDTH, 3)
        self.all = nn.Linear(16 * WIDTH, 3)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        deep = self.head(F.relu(self.next(x)).mean((2, 3)))
        logits: Tensor = deep + self.means(x.mean((2, 3))) + self.all(x.flatten(1))
        return logits


class HiddenIsOutput(nn.Module):
    """The hidden map is an output too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.conv(x))
        return self.head(hidden.mean((2, 3))), hidden


class ResidualOfInput(nn.Module):
    """What is added to the input has the input's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv2d(WIDTH, 3, 3, padding=1)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv2(F.relu(self.conv1(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Recurrent(nn.Module):
    """An LSTM over rows of the image: four gates in one matrix, and a state."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(24, WIDTH)
        self.lstm = nn.LSTM(WIDTH, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = F.relu(self.enter(x.transpose(1, 2).flatten(2)))
        states, _ = self.lstm(rows)
        logits: Tensor = self.head(states[:, -1])
        return logits


class TorchAttention(nn.Module):
    """torch's own encoder layer, whose projections lie in one matrix of no module."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(24, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, dim_feedforward=10, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.layer(self.enter(x.transpose(1, 2).flatten(2)))
        logits: Tensor = self.head(rows.mean(1))
        return logits


def _family(name: str, make: type[nn.Module]) -> Family:
    example = partial(images, size=8)
    return Family(
        name, lambda: ready(make(), example()), example, {"x": {0: "batch"}}, modality="image"
    )


ADVERSARIES: dict[str, Family] = {
    name: _family(name, make)
    for name, make in {
        "reshape-mixes": ReshapeMixes,
        "space-becomes-channels": SpaceBecomesChannels,
        "shuffled": Shuffled,
        "rolled": Rolled,
        "flipped": Flipped,
        "permuted": Permuted,
        "pixel-shuffled": PixelShuffled,
        "pixel-unshuffled": PixelUnshuffled,
        "interleaved": Interleaved,
        "first-half": FirstHalf,
        "every-second": EverySecond,
        "gated-by-first": GatedByFirst,
        "twice-concatenated": TwiceConcatenated,
        "repeated-in-place": RepeatedInPlace,
        "halves-added": HalvesAdded,
        "halves-gated": HalvesGated,
        "uneven-split": UnevenSplit,
        "writes-into-slice": WritesIntoSlice,
        "channel-softmax": ChannelSoftmax,
        "channel-cumsum": ChannelCumsum,
        "channel-sum": ChannelSum,
        "channel-mean": ChannelMean,
        "channel-max": ChannelMax,
        "norm-per-channel": NormPerChannel,
        "shaped-like-another": ShapedLikeAnother,
        "channel-sort": ChannelSort,
        "channel-normalised": ChannelNormalised,
        "channel-layer-norm": ChannelLayerNorm,
        "mixed-by-einsum": MixedByEinsum,
        "outer-product": OuterProduct,
        "channel-attention": ChannelAttention,
        "width-as-number": WidthAsNumber,
        "unknown-op": UnknownOp,
        "added-per-channel": AddedPerChannel,
        "buffer-per-channel": BufferPerChannel,
        "branch-on-buffer": BranchOnBuffer,
        "prelu-per-channel": PReluPerChannel,
        "depth-multiplier": DepthMultiplier,
        "grouped-uneven": GroupedUneven,
        "transposed-grouped": TransposedGrouped,
        "same-module-twice": SameModuleTwice,
        "same-module-apart": SameModuleApart,
        "tied-modules": TiedModules,
        "tied-transposed": TiedTransposed,
        "standardised-weight": StandardisedWeight,
        "wrong-flatten": WrongFlatten,
        "many-readers": ManyReaders,
        "hidden-is-output": HiddenIsOutput,
        "residual-of-input": ResidualOfInput,
        "recurrent": Recurrent,
        "torch-attention": TorchAttention,
    }.items()
}

# Every `Trap` has the inner width 6 between conv2 and the head, which is always free; so is the
# width that these names are about.
SOLVABLE = frozenset(
    "twice-concatenated halves-added branch-on-buffer prelu-per-channel added-per-channel "
    "many-readers wrong-flatten depth-multiplier residual-of-input same-module-apart "
    "norm-per-channel shaped-like-another".split()
)
