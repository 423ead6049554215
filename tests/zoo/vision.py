"""Small image classifiers in plain torch: one class for each way channels are coupled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_norm(
    channels: int, width: int, kernel: int, act: nn.Module, *, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """A convolution that keeps the size at stride 1, BatchNorm and an activation."""
    conv = nn.Conv2d(
        channels, width, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
    )
    return nn.Sequential(conv, nn.BatchNorm2d(width), act)


# ---------------------------------------------------------------- residual streams


class CifarBlock(nn.Module):
    """Two 3x3 convolutions; where the shape changes the shortcut has no weights (option A)."""

    def __init__(self, channels: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.pad = (width - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        short = x
        if self.stride != 1 or self.pad:
            short = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + short)


class CifarResNet(nn.Module):
    """The CIFAR ResNet of depth 6n + 2; at width 16 the published state dicts load."""

    def __init__(self, depth: int = 8, *, width: int = 4, classes: int = 10) -> None:
        super().__init__()
        count = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, count, stride=1)
        self.layer2 = self._stage(width, 2 * width, count, stride=2)
        self.layer3 = self._stage(2 * width, 4 * width, count, stride=2)
        self.linear = nn.Linear(4 * width, classes)

    @staticmethod
    def _stage(channels: int, width: int, count: int, *, stride: int) -> nn.Sequential:
        first = CifarBlock(channels, width, stride=stride)
        return nn.Sequential(first, *(CifarBlock(width, width, stride=1) for _ in range(count - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.avg_pool2d(x, x.size(3)).flatten(1)
        logits: Tensor = self.linear(x)
        return logits


class Bottleneck(nn.Module):
    """1x1, 3x3 (grouped if asked), 1x1; a 1x1 projection where the shape changes."""

    def __init__(
        self, channels: int, inner: int, width: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.reduce = conv_norm(channels, inner, 1, nn.ReLU())
        self.spatial = conv_norm(inner, inner, 3, nn.ReLU(), stride=stride, groups=groups)
        self.expand = conv_norm(inner, width, 1, nn.Identity())
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = conv_norm(channels, width, 1, nn.Identity(), stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.expand(self.spatial(self.reduce(x))) + self.shortcut(x))


class BottleneckResNet(nn.Module):
    """A stem with max pooling and two stages of bottlenecks; `groups` makes it a ResNeXt."""

    def __init__(self, *, inner: int = 4, groups: int = 1, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 6, 7, nn.ReLU(), stride=2), nn.MaxPool2d(3, 2, 1))
        self.stage1 = nn.Sequential(
            Bottleneck(6, inner, 12, groups=groups), Bottleneck(12, inner, 12, groups=groups)
        )
        self.stage2 = nn.Sequential(
            Bottleneck(12, 2 * inner, 16, stride=2, groups=groups),
            Bottleneck(16, 2 * inner, 16, groups=groups),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stem(x)))
        logits: Tensor = self.fc(torch.flatten(self.pool(x), 1))
        return logits


class GroupNormBlock(nn.Module):
    """A pre-activation residual block whose norms mix the channels of a group."""

    def __init__(self, width: int, inner: int, *, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width)
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, inner)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        update: Tensor = self.conv2(F.silu(self.norm2(h)))
        return x + update


class GroupNormNet(nn.Module):
    """GroupNorm over several, one and as many groups as channels."""

    def __init__(self, *, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(GroupNormBlock(8, 12, groups=4), GroupNormBlock(8, 6, groups=1))
        self.down = nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=False)  # the norm takes it out
        self.norm = nn.GroupNorm(6, 6)
        self.head = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.down(self.blocks(self.stem(x)))))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


class InstanceNormNet(nn.Module):
    """Channels normalised each by itself: with a scale, without, and by statistics of training,
    with a scale and without."""

    def __init__(self, *, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.InstanceNorm2d(6, affine=True)
        self.down = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)  # the norm takes it out
        self.norm2 = nn.InstanceNorm2d(8)
        self.last = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.norm3 = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
        self.wide = nn.Conv2d(6, 8, 1)
        self.norm4 = nn.InstanceNorm2d(8, track_running_stats=True)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.stem(x)))
        x = F.silu(self.norm2(self.down(x)))
        x = F.relu(self.norm3(self.last(x)))
        x = F.relu(self.norm4(self.wide(x)))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


class SoundNet(nn.Module):
    """Convolutions along time; the norm takes every channel alone, as that of wav2vec 2.0."""

    def __init__(self, *, classes: int = 5) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 6, 5, stride=2, bias=False)
        self.norm = nn.GroupNorm(6, 6)
        self.second = nn.Conv1d(6, 8, 3, stride=2)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.first(x)))
        logits: Tensor = self.head(F.gelu(self.second(x)).mean(dim=2))
        return logits


# ---------------------------------------------------------------- chains and concatenations


class Vgg(nn.Module):
    """Convolutions with bias and BatchNorm, flattened over 2x2 positions into linear layers."""

    def __init__(
        self, widths: Sequence[int | None] = (4, None, 6, 6, None, 8, None), *, classes: int = 5
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in widths:
            if width is None:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(channels * 4, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return logits


class Inception(nn.Module):
    """Four branches of different depth, concatenated along the channels."""

    def __init__(self, channels: int, *, widths: Sequence[int]) -> None:
        super().__init__()
        one, three_in, three, five_in, five, pooled = widths
        self.one = conv_norm(channels, one, 1, nn.ReLU())
        self.three = nn.Sequential(
            conv_norm(channels, three_in, 1, nn.ReLU()), conv_norm(three_in, three, 3, nn.ReLU())
        )
        self.five = nn.Sequential(
            conv_norm(channels, five_in, 1, nn.ReLU()), conv_norm(five_in, five, 5, nn.ReLU())
        )
        self.pooled = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), conv_norm(channels, pooled, 1, nn.ReLU())
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], dim=1)


class GoogLeNet(nn.Module):
    """A stem, two Inception modules, a pooling between them and one after them."""

    def __init__(self, *, scale: int = 1, classes: int = 5) -> None:
        super().__init__()
        s = scale
        self.stem = conv_norm(3, 6 * s, 3, nn.ReLU(), stride=2)
        self.inception1 = Inception(6 * s, widths=[w * s for w in (4, 3, 5, 2, 3, 4)])
        self.pool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception2 = Inception(16 * s, widths=[w * s for w in (3, 4, 6, 2, 4, 3)])
        self.head = nn.Linear(16 * s, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inception2(self.pool(self.inception1(self.stem(x))))
        logits: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class DenseLayer(nn.Module):
    """Norm first, then a 1x1 and a 3x3 convolution that adds `growth` channels to the pile."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 2 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, pile: list[Tensor]) -> Tensor:
        x = self.conv1(F.relu(self.norm1(torch.cat(pile, dim=1))))
        new: Tensor = self.conv2(F.relu(self.norm2(x)))
        return new


class DenseNet(nn.Module):
    """Two dense blocks with a transition that halves the channels."""

    def __init__(self, *, growth: int = 4, stem: int = 6, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, stem, 3, stride=2, padding=1, bias=False)
        self.block1 = nn.ModuleList(DenseLayer(stem + i * growth, growth) for i in range(3))
        channels = stem + 3 * growth
        half = channels // 2
        self.transition = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, half, 1), nn.AvgPool2d(2)
        )
        self.block2 = nn.ModuleList(DenseLayer(half + i * growth, growth) for i in range(2))
        self.norm = nn.BatchNorm2d(half + 2 * growth)
        self.classifier = nn.Linear(half + 2 * growth, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transition(self._dense(self.block1, self.stem(x)))
        x = F.relu(self.norm(self._dense(self.block2, x)))
        logits: Tensor = self.classifier(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))
        return logits

    @staticmethod
    def _dense(block: nn.ModuleList, x: Tensor) -> Tensor:
        pile = [x]
        for layer in block:
            pile.append(layer(pile))
        return torch.cat(pile, dim=1)


# ---------------------------------------------------------------- mobile nets


class SqueezeExcite(nn.Module):
    """Scale every channel by a gate computed from the means of all channels."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.hardsigmoid(self.expand(F.relu(self.reduce(self.pool(x)))))
        return x * gate


class InvertedResidual(nn.Module):
    """Expand by 1x1, depthwise, squeeze-excite if asked, project back without activation."""

    def __init__(
        self,
        channels: int,
        inner: int,
        width: int,
        *,
        act: type[nn.Module],
        kernel: int = 3,
        stride: int = 1,
        squeezed: int = 0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if inner != channels:
            layers.append(conv_norm(channels, inner, 1, act()))
        layers.append(conv_norm(inner, inner, kernel, act(), stride=stride, groups=inner))
        if squeezed:
            layers.append(SqueezeExcite(inner, squeezed))
        layers.append(conv_norm(inner, width, 1, nn.Identity()))
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """Inverted residuals under ReLU6; the first has no expansion."""

    def __init__(self, *, classes: int = 5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_norm(3, 6, 3, nn.ReLU6(), stride=2),
            InvertedResidual(6, 6, 4, act=nn.ReLU6),
            InvertedResidual(4, 12, 6, act=nn.ReLU6, stride=2),
            InvertedResidual(6, 16, 6, act=nn.ReLU6),
            InvertedResidual(6, 12, 8, act=nn.ReLU6, stride=2),
            conv_norm(8, 16, 1, nn.ReLU6()),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, classes))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).mean([2, 3]))
        return logits


class MobileNetV3(nn.Module):
    """Squeeze-excite, Hardswish, 5x5 depthwise filters, and two linear layers at the end."""

    def __init__(self, *, scale: int = 1, classes: int = 5) -> None:
        super().__init__()
        s, hard = scale, nn.Hardswish
        self.features = nn.Sequential(
            conv_norm(3, 6 * s, 3, hard(), stride=2),
            InvertedResidual(6 * s, 8 * s, 6 * s, act=nn.ReLU, squeezed=4 * s),
            InvertedResidual(6 * s, 12 * s, 8 * s, act=hard, kernel=5, stride=2, squeezed=5 * s),
            InvertedResidual(8 * s, 16 * s, 8 * s, act=hard, kernel=5),
            conv_norm(8 * s, 16 * s, 1, hard()),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(16 * s, 12 * s), hard(), nn.Dropout(0.2), nn.Linear(12 * s, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.pool(self.features(x)), 1)
        logits: Tensor = self.classifier(x)
        return logits


class ShuffleUnit(nn.Module):
    """Work on one half of the channels, keep the other, and interleave them afterwards."""

    def __init__(self, half: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            conv_norm(half, half, 1, nn.ReLU()),
            conv_norm(half, half, 3, nn.Identity(), groups=half),
            conv_norm(half, half, 1, nn.ReLU()),
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, worked = x.chunk(2, dim=1)
        return shuffle(torch.cat([kept, self.branch(worked)], dim=1), groups=2)


def shuffle(x: Tensor, *, groups: int) -> Tensor:
    """Take one channel of each group in turn."""
    batch, channels, height, width = x.shape
    apart = x.view(batch, groups, channels // groups, height, width).transpose(1, 2)
    return apart.contiguous().view(batch, channels, height, width)


class ShuffleNet(nn.Module):
    """Channel split and shuffle, then a grouped convolution on shuffled channels."""

    def __init__(self, *, classes: int = 5) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8, 3, nn.ReLU(), stride=2)
        self.units = nn.Sequential(ShuffleUnit(4), ShuffleUnit(4))
        self.mix = conv_norm(8, 12, 1, nn.ReLU(), groups=2)
        self.last = conv_norm(12, 10, 1, nn.ReLU(), groups=2)
        self.fc = nn.Linear(10, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(shuffle(self.mix(self.units(self.stem(x))), groups=2))
        logits: Tensor = self.fc(x.mean([2, 3]))
        return logits
