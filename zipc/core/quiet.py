"""Keep third-party chatter off the terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Iterator

_NOISY = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")
_ALONE = threading.RLock()  # streams, loggers and warnings belong to the whole process


@contextlib.contextmanager
def hush() -> Iterator[None]:
    """Silence the exporter's chatter (missing optional packages, deprecations of its own).

    One thread at a time is inside.
    """
    loggers = [logging.getLogger(n) for n in _NOISY]
    with _ALONE:
        levels = [log.level for log in loggers]
        for log in loggers:
            log.setLevel(logging.ERROR)
        try:
            with (
                warnings.catch_warnings(),
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),  # torch.export prints what fails there
            ):
                warnings.simplefilter("ignore")
                yield
        finally:
            for log, level in zip(loggers, levels, strict=True):
                log.setLevel(level)
