"""`zipc profile`: build or extend the latency table."""

from __future__ import annotations

from rich.console import Console

from zipc.cli.dry_run import dry_run
from zipc.cli.flags import ModelFlags, verb
from zipc.cli.running import Outcome, run_verb
from zipc.core.types import Progress


@verb(ModelFlags)
def profile_verb(flags: ModelFlags) -> None:
    """Measure what every level of MODEL costs on the target, and keep the table."""

    def body(progress: Progress) -> Outcome:
        request = flags.request()
        if flags.dry_run:
            return dry_run(request)
        from zipc.pipeline import profile_model

        result = profile_model(request, progress=progress)

        def show(console: Console) -> None:
            how = "found in the cache" if result.from_cache else f"made in {result.seconds:.0f} s"
            console.print(f"{result.entries} {result.kind} prices, {how}")
            console.print(str(result.table_path), markup=False, soft_wrap=True)

        return Outcome(result.to_json(), show)

    run_verb(body, output=flags.format)
