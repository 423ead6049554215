"""What runners of graphs in this process have in common, whatever the runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from zipc.core.errors import ExportMismatch, UsageError
from zipc.core.types import Workload
from zipc.profiler.agent import TITLES, one_inference, values
from zipc.profiler.facts import one_line
from zipc.profiler.runners.inputs import graph_inputs


class SessionRunner(ABC):
    """Times one graph; a `Runner`. A session is run, and tells its inputs and outputs, as those of
    ONNX Runtime do.

    Raises:
        ExportMismatch: the runtime cannot load or run the graph.
        UsageError: an input of the graph is missing from `feeds`, or the workload does not say how
            large it is.
    """

    runtime: ClassVar[str]
    place: ClassVar[Mapping[str, Any]]  # the device, in the runtime's words

    def __init__(
        self,
        model: Path | bytes,
        *,
        workload: Workload,
        feeds: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._name = str(model) if isinstance(model, Path) else "graph in memory"
        self._options = self.options(workload)
        self._session = self._load(model)
        if feeds is None:
            self._feeds = self.made_up(self._session, model, workload)
        else:
            self._feeds = self._select(feeds)

    @staticmethod
    @abstractmethod
    def version() -> str:
        """That of the runtime."""

    @staticmethod
    @abstractmethod
    def options(workload: Workload) -> dict[str, Any]:
        """What a session for this workload is opened with, by the runtime's names."""

    @staticmethod
    @abstractmethod
    def open(model: str | bytes, options: Mapping[str, Any]) -> Any:
        """Open a session of a path or a serialised graph. The runtime's own errors come through."""

    @staticmethod
    def made_up(session: Any, model: Path | bytes, workload: Workload) -> dict[str, np.ndarray]:
        """Inputs of the graph, as large as the workload says.

        As the file has them: a session may have forgotten the names of open axes.
        """
        content = model.read_bytes() if isinstance(model, Path) else model
        given = graph_inputs(content, workload)
        return {name: values(name, spec["shape"], spec["dtype"]) for name, spec in given.items()}

    @classmethod
    def opened_with(cls, workload: Workload) -> dict[str, Any]:
        """What a session for this workload is opened with, and where, for the manifest."""
        return {**cls.options(workload), **cls.place}

    @property
    def session_options(self) -> dict[str, Any]:
        """What the session was opened with, for the manifest."""
        return {**self._options, **self.place}

    def run(self) -> float:
        """Do one inference and return its milliseconds."""
        try:
            return one_inference(self._session, self._feeds)
        except Exception as error:  # errors of runtimes share no base
            raise self._cannot_run(error) from error

    def outputs(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run on `feeds`; entries the graph has no input for are ignored."""
        names = [output.name for output in self._session.get_outputs()]
        selected = self._select(feeds)
        try:
            found = self._session.run(names, selected)
        except Exception as error:  # errors of runtimes share no base
            raise self._cannot_run(error) from error
        return dict(zip(names, found, strict=True))

    def _load(self, model: Path | bytes) -> Any:
        if isinstance(model, Path) and not model.is_file():
            raise UsageError(f"There is no ONNX file at {model}.")
        source = str(model) if isinstance(model, Path) else model
        try:
            return self.open(source, self._options)
        except Exception as error:  # errors of runtimes share no base
            raise self.cannot_load(self._name, error) from error

    @classmethod
    def cannot_load(cls, name: str, error: Exception) -> ExportMismatch:
        """The error that says so of a graph."""
        title = TITLES[cls.runtime]
        return ExportMismatch(
            f"{title} {cls.version()} cannot load {name}: {one_line(error)}. "
            f"Export it again, or install the {title} it was made for."
        )

    def _select(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        wanted = [node.name for node in self._session.get_inputs()]
        missing = [name for name in wanted if name not in feeds]
        if missing:
            raise UsageError(
                f"{self._name} needs the inputs {missing}, which were not given; "
                f"given: {sorted(feeds)}."
            )
        return {name: feeds[name] for name in wanted}

    def _cannot_run(self, error: Exception) -> ExportMismatch:
        return ExportMismatch(
            f"{TITLES[self.runtime]} {self.version()} cannot run {self._name}: {one_line(error)}. "
            "A sequence may be longer than the graph takes: give a smaller --sequence-length."
        )
