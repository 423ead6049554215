"""`zipc profile`: build or extend the latency table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from zipc.cli.dry_run import dry_run
from zipc.cli.flags import HostsFlag, ModelFlags, read_hosts, refuse_python_alone, verb
from zipc.cli.progress import Lines
from zipc.cli.running import Outcome, error_details, run_verb
from zipc.core.errors import UsageError, ZipcError
from zipc.core.request import Request
from zipc.core.types import Progress
from zipc.core.workload import parse_workloads

if TYPE_CHECKING:
    from zipc.profiling import ProfileResult


@dataclass(frozen=True, kw_only=True)
class ProfileFlags(ModelFlags):
    """What is priced, at which sizes, and on which boards."""

    hosts: HostsFlag = None
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
        given = (self.sequence_length, self.past_length, self.input_shapes or None)
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

    def boards(self) -> list[tuple[str, str]]:
        """Every board with its Python; none for this machine.

        Raises:
            UsageError: a board is named twice, or the file of them cannot be read.
        """
        found = [(address, self.host_python) for address in self.host or ()]
        if self.hosts is not None:
            found += read_hosts(self.hosts, python=self.host_python)
        refuse_python_alone(found, self.host_python)
        names = [address for address, _ in found]
        twice = [address for address in names if names.count(address) > 1]
        if twice:
            raise UsageError(f"Board {twice[0]} is named twice. Name it once.")
        return found

    def _board(self) -> dict[str, Any]:
        first, *_ = [*self.boards(), (None, self.host_python)]
        return dict(zip(("host", "host_python"), first, strict=True))


@verb(ProfileFlags)
def profile_verb(flags: ProfileFlags) -> None:
    """Measure what every level of MODEL costs on the target, and keep the table."""

    def body(progress: Progress) -> Outcome:
        requests, boards = flags.requests(), flags.boards()
        if flags.dry_run:
            return _together([dry_run(request) for request in requests], flags)
        if len(boards) > 1:
            return _several(requests, boards, progress)
        from zipc.profiling import profile_model

        results = [profile_model(request, progress=progress) for request in requests]
        return _together([Outcome(r.to_json(), partial(_show, result=r)) for r in results], flags)

    run_verb(body, output=flags.format, resumes=not flags.dry_run)


def _together(outcomes: Sequence[Outcome], flags: ProfileFlags) -> Outcome:
    """One outcome of those of all workloads."""

    def show(console: Console) -> None:
        for outcome in outcomes:
            outcome.show(console)

    documents = [outcome.document for outcome in outcomes]
    return Outcome(documents[0] if flags.workloads is None else {"tables": documents}, show)


def _several(
    requests: Sequence[Request], boards: Sequence[tuple[str, str]], progress: Progress
) -> Outcome:
    """Profile boards at once; the exit code is the highest of those that failed."""
    from zipc.profiling import profile_boards

    def lines(host: str) -> Progress:
        return Lines(lambda text: progress.info(f"{host}: {text}"))

    found: list[tuple[str, ProfileResult | ZipcError]] = []
    for request in requests:
        asked = [replace(request, host=host, host_python=python) for host, python in boards]
        results = profile_boards(asked, progress=progress, progress_of=lines)
        found += [(host, result) for (host, _), result in zip(boards, results, strict=True)]
    failed = [result.exit_code for _, result in found if isinstance(result, ZipcError)]

    def show(console: Console) -> None:
        for host, result in found:
            if isinstance(result, ZipcError):
                told = str(result).removeprefix(f"{host}: ")
                console.print(f"{host}: failed: {told}", markup=False, soft_wrap=True)
            else:
                _show(console, result, host=f"{host}: ")

    hosts = [{"host": host, **_document(result)} for host, result in found]
    return Outcome({"hosts": hosts}, show, max(failed, default=0))


def _document(result: ProfileResult | ZipcError) -> dict[str, Any]:
    return error_details(result) if isinstance(result, ZipcError) else result.to_json()


def _show(console: Console, result: ProfileResult, *, host: str = "") -> None:
    how = "found in the cache" if result.from_cache else f"made in {result.seconds:.0f} s"
    prices = f"{host}{result.workload}: {result.entries} {result.kind} prices, {how}"
    console.print(prices, markup=False, soft_wrap=True)
    console.print(str(result.table_path), markup=False, soft_wrap=True)
