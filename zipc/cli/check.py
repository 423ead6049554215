"""`zipc check`: the gate, two artifacts against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zipc.cli.flags import FormatFlag
from zipc.cli.printing import show_fields
from zipc.cli.quantities import parse_latency, parse_seconds
from zipc.cli.running import Outcome, run_verb
from zipc.core.types import Progress


def check_verb(
    new: Annotated[
        Path,
        typer.Argument(
            help="Output folder or .onnx file to judge.", metavar="NEW", show_default=False
        ),
    ],
    *,
    baseline: Annotated[
        Path, typer.Option("--baseline", help="What it is judged against.", show_default=False)
    ],
    fail_on: Annotated[
        str, typer.Option("--fail-on", help="Rules, e.g. p50:5%,p99:15%,size:2%.")
    ] = "p50:5%",
    max_time: Annotated[
        str, typer.Option("--max-time", help="Undecided after this long is inconclusive.")
    ] = "60s",
    min_delta: Annotated[
        str | None,
        typer.Option("--min-delta", help="A slowdown smaller than this never fails, e.g. 0.1ms."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads the runtime may use.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Batch timed.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option("--sequence-length", min=1, help="Tokens per sequence timed.")
    ] = None,
    format: FormatFlag = "table",
) -> None:
    """Fail when NEW is slower than BASELINE: exit 0 pass, 1 regressed, 3 inconclusive."""

    def body(progress: Progress) -> Outcome:
        from zipc import gate

        result = gate.check(
            new,
            baseline,
            fail_on=fail_on,
            max_time_s=parse_seconds(max_time, "--max-time"),
            min_delta_ms=0.0 if min_delta is None else parse_latency(min_delta, "--min-delta"),
            batch_size=batch_size,
            sequence_length=sequence_length,
            threads=threads,
            progress=progress,
        )
        document = result.to_json()
        return Outcome(document, lambda console: show_fields(console, document), result.exit_code)

    run_verb(body, output=format)
