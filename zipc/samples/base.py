"""What the pipeline asks of the data of a compile, whatever kind of data it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from zipc.metrics import EvalResult
from zipc.splitting import PARTS, Part

Feeds = dict[str, Tensor]  # a batch: the model's inputs by name, rows first
Readout = Callable[[Sequence[Tensor], Mapping[str, Tensor]], Tensor]  # outputs, feeds -> (n, d)
Oracle = Callable[[Tensor, Tensor], float]  # dense, candidate: read-outs of all batches -> loss


@dataclass(frozen=True, slots=True)
class Drawn:
    """Rows drawn from a part as batches, and how a candidate's outputs on them are judged."""

    batches: list[Feeds]
    readout: Readout
    oracle: Oracle


class Samples(Protocol):
    """Rows cut into parts, fed to a model, and the quality of a model read from them.

    Statistics come from calibration, candidates are judged on search, dev is for whoever develops,
    and test is read once, for the report.
    """

    @property
    def metric(self) -> str:
        """Name of the figure in the report; see `metrics.lower_is_better`."""

    @property
    def description(self) -> str:
        """One line on what was read and how it was cut."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should be told about how quality is read, one line each."""

    @property
    def sha256(self) -> str:
        """Hash of all parts as cut and fed: everything later depends on the data through it."""

    @property
    def unit(self) -> str:
        """What a row is: texts, images, windows, rows."""

    @property
    def sizes(self) -> Mapping[Part, int]:
        """Rows of each part."""

    def draw(self, part: Part, *, limit: int, seed: int) -> Drawn:
        """Rows of a part drawn by seed, about as much to compute as `limit` short texts."""

    def compare(
        self, dense: bytes, compiled: bytes, part: Part, *, runtime: str = "onnxruntime"
    ) -> tuple[EvalResult, EvalResult]:
        """Read the metric of the dense and of the compiled ONNX file on the same rows.

        Raises:
            UsageError: the runtime cannot load or run one, or its outputs are not finite.
        """

    def deviation(self, model: bytes, part: Part, *, runtime: str = "onnxruntime") -> float | None:
        """Return how far the outputs of a row alone may be from those of the row in a batch.

        None for a model that takes batches of one size only.
        """


__all__ = ["PARTS", "Drawn", "EvalResult", "Feeds", "Oracle", "Part", "Readout", "Samples"]
