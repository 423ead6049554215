"""`zipc profile`: build or extend the latency table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from zipc.cli.dry_run import dry_run
from zipc.cli.flags import ModelFlags, verb
from zipc.cli.running import Outcome, run_verb
from zipc.core.errors import UsageError
from zipc.core.request import Request
from zipc.core.types import Progress
from zipc.core.workload import parse_workloads

if TYPE_CHECKING:
    from zipc.profiling import ProfileResult


@dataclass(frozen=True, kw_only=True)
class ProfileFlags(ModelFlags):
    """What is priced, and at which sizes."""

    workloads: Annotated[
        str | None,
        typer.Option(
            "--workloads",
            help="Several sizes, a table each: 1x128,8x128,1x384 are batch x sequence (with "
            "--phase decode, batch x past); 1,8 are batches.",
            metavar="SIZES,...",
            rich_help_panel="Workload",
        ),
    ] = None

    def requests(self) -> list[Request]:
        """One for each workload.

        Raises:
            UsageError: as `request`; or sizes are given twice.
        """
        if self.workloads is None:
            return [self.request()]
        given = (self.sequence_length, self.past_length, self.input_shapes)
        if self.batch_size != 1 or any(size is not None for size in given):
            raise UsageError(
                "--workloads has all sizes: leave out --batch-size, --sequence-length, "
                "--past-length and --input-shapes."
            )
        length = "past_length" if self.phase == "decode" else "sequence_length"
        return [
            Request(**(self._fields() | {"batch_size": batch, length: tokens}))
            for batch, tokens in parse_workloads(self.workloads)
        ]


@verb(ProfileFlags)
def profile_verb(flags: ProfileFlags) -> None:
    """Measure what every level of MODEL costs on the target, and keep the table."""

    def body(progress: Progress) -> Outcome:
        requests = flags.requests()
        if flags.dry_run:
            return dry_run(requests[0])
        from zipc.profiling import profile_model

        results = [profile_model(request, progress=progress) for request in requests]
        documents = [result.to_json() for result in results]
        return Outcome(
            documents[0] if flags.workloads is None else {"tables": documents},
            lambda console: _show(console, results),
        )

    run_verb(body, output=flags.format)


def _show(console: Console, results: Sequence[ProfileResult]) -> None:
    for result in results:
        how = "found in the cache" if result.from_cache else f"made in {result.seconds:.0f} s"
        prices = f"{result.entries} {result.kind} prices, {how}"
        console.print(f"{result.workload}: {prices}", markup=False, soft_wrap=True)
        console.print(str(result.table_path), markup=False, soft_wrap=True)
