"""Small networks that predict at every position: two U-Nets and a YOLOv8-style detector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.zoo.values import images, ready
from tests.zoo.vision import conv_norm


class UNet(nn.Module):
    """Two levels down and up with skip concatenations, and a 1x1 head.

    `transposed` doubles the size with a ConvTranspose2d, otherwise by upsampling and a 1x1 filter.
    """

    def __init__(self, *, transposed: bool = True, scale: int = 1, classes: int = 3) -> None:
        super().__init__()
        s = scale
        self.down1 = _double(3, 4 * s)
        self.down2 = _double(4 * s, 6 * s)
        self.bottom = _double(6 * s, 8 * s)
        self.pool = nn.MaxPool2d(2)
        self.up2 = _enlarge(8 * s, 6 * s, transposed=transposed)
        self.merge2 = _double(12 * s, 6 * s)
        self.up1 = _enlarge(6 * s, 4 * s, transposed=transposed)
        self.merge1 = _double(8 * s, 4 * s)
        self.head = nn.Conv2d(4 * s, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        coarse = self.down2(self.pool(fine))
        deep = self.bottom(self.pool(coarse))
        coarse = self.merge2(torch.cat([coarse, self.up2(deep)], dim=1))
        fine = self.merge1(torch.cat([fine, self.up1(coarse)], dim=1))
        masks: Tensor = self.head(fine)
        return masks


def _double(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        conv_norm(channels, width, 3, nn.ReLU()), conv_norm(width, width, 3, nn.ReLU())
    )


def _enlarge(channels: int, width: int, *, transposed: bool) -> nn.Module:
    if transposed:
        return nn.ConvTranspose2d(channels, width, 2, stride=2)
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
        nn.Conv2d(channels, width, 1),
    )


class Residual(nn.Module):
    """Two 3x3 convolutions, added to their input if `add`."""

    def __init__(self, width: int, *, add: bool) -> None:
        super().__init__()
        self.cv1 = conv_norm(width, width, 3, nn.SiLU())
        self.cv2 = conv_norm(width, width, 3, nn.SiLU())
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.cv2(self.cv1(x))
        return x + y if self.add else y


class C2f(nn.Module):
    """Two halves of one convolution; a chain grows from the second; all links are concatenated.

    `sizes` splits by a list of sizes instead of a number of chunks.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        half: int,
        count: int = 1,
        add: bool = False,
        sizes: bool = False,
    ) -> None:
        super().__init__()
        self.half = half
        self.sizes = sizes
        self.cv1 = conv_norm(channels, 2 * half, 1, nn.SiLU())
        self.cv2 = conv_norm((2 + count) * half, width, 1, nn.SiLU())
        self.m = nn.ModuleList(Residual(half, add=add) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x)
        links = list(y.split((self.half, self.half), 1) if self.sizes else y.chunk(2, 1))
        for module in self.m:
            links.append(module(links[-1]))
        out: Tensor = self.cv2(torch.cat(links, 1))
        return out


class Sppf(nn.Module):
    """Max pooling of one map three times over, concatenated with the map itself."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.cv1 = conv_norm(channels, channels // 2, 1, nn.SiLU())
        self.cv2 = conv_norm(channels // 2 * 4, width, 1, nn.SiLU())
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        links = [self.cv1(x)]
        for _ in range(3):
            links.append(self.pool(links[-1]))
        out: Tensor = self.cv2(torch.cat(links, 1))
        return out


class Detect(nn.Module):
    """Boxes and classes of every cell of every map: (batch, 4 + classes, cells).

    A side of a box is the mean of a softmax over `bins` distances.
    """

    def __init__(self, channels: Sequence[int], *, classes: int, bins: int) -> None:
        super().__init__()
        self.classes, self.bins = classes, bins
        self.strides = [4 * 2**i for i in range(len(channels))]
        self.box = nn.ModuleList(self._branch(c, 6, 4 * bins) for c in channels)
        self.cls = nn.ModuleList(self._branch(c, 5, classes) for c in channels)
        self.mean = nn.Conv2d(bins, 1, 1, bias=False)

    @staticmethod
    def _branch(channels: int, inner: int, width: int) -> nn.Sequential:
        return nn.Sequential(conv_norm(channels, inner, 3, nn.SiLU()), nn.Conv2d(inner, width, 1))

    def forward(self, maps: list[Tensor]) -> Tensor:
        batch = maps[0].shape[0]
        found = [
            torch.cat((box(m), cls(m)), 1)
            for m, box, cls in zip(maps, self.box, self.cls, strict=True)
        ]
        flat = torch.cat([f.view(batch, f.shape[1], -1) for f in found], 2)
        sides, scores = flat.split((4 * self.bins, self.classes), 1)
        spread = sides.view(batch, 4, self.bins, -1).transpose(2, 1).softmax(1)
        near, far = self.mean(spread).view(batch, 4, -1).chunk(2, 1)
        centre, scale = self._cells(maps)
        low, high = centre - near, centre + far
        boxes = torch.cat(((low + high) / 2, high - low), 1) * scale
        return torch.cat((boxes, scores.sigmoid()), 1)

    def _cells(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Centres (2, cells) and strides (1, cells) of the cells of all maps."""
        centres, scales = [], []
        for m, stride in zip(maps, self.strides, strict=True):
            height, width = m.shape[2:]
            y, x = torch.meshgrid(
                torch.arange(height, dtype=m.dtype) + 0.5,
                torch.arange(width, dtype=m.dtype) + 0.5,
                indexing="ij",
            )
            centres.append(torch.stack((x, y)).view(2, -1))
            scales.append(torch.full((1, height * width), float(stride), dtype=m.dtype))
        return torch.cat(centres, 1), torch.cat(scales, 1)


class Yolo(nn.Module):
    """A backbone of C2f blocks, a neck that goes up and down again, and a head on two maps."""

    def __init__(self, *, scale: int = 1, classes: int = 3, bins: int = 4) -> None:
        super().__init__()
        s = scale
        self.stem = conv_norm(3, 4 * s, 3, nn.SiLU(), stride=2)
        self.down1 = conv_norm(4 * s, 8 * s, 3, nn.SiLU(), stride=2)
        self.c2f1 = C2f(8 * s, 8 * s, half=4 * s, count=2, add=True)
        self.down2 = conv_norm(8 * s, 12 * s, 3, nn.SiLU(), stride=2)
        self.c2f2 = C2f(12 * s, 12 * s, half=6 * s, add=True, sizes=True)
        self.sppf = Sppf(12 * s, 10 * s)
        self.grow = nn.Upsample(scale_factor=2, mode="nearest")
        self.up = C2f(18 * s, 6 * s, half=3 * s)
        self.down3 = conv_norm(6 * s, 6 * s, 3, nn.SiLU(), stride=2)
        self.out = C2f(16 * s, 10 * s, half=4 * s)
        self.detect = Detect((6 * s, 10 * s), classes=classes, bins=bins)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.c2f1(self.down1(self.stem(x)))
        coarse = self.sppf(self.c2f2(self.down2(fine)))
        fine = self.up(torch.cat([self.grow(coarse), fine], 1))
        coarse = self.out(torch.cat([self.down3(fine), coarse], 1))
        boxes: Tensor = self.detect([fine, coarse])
        return boxes


def detector() -> nn.Module:
    """A `Yolo` whose mean is taken over the distances 0, 1, 2, ... and not over drawn ones.

    A softmax varies so little that a filter scaled to its spread would multiply rounding errors.
    """
    module = Yolo()
    ready(module, images())
    distances = module.detect.mean.weight
    distances.copy_(torch.arange(distances.numel()).view_as(distances))
    return module
