"""`zipc plan`: stop after the allocation and print it."""

from __future__ import annotations

from zipc.cli.compile import require_data
from zipc.cli.dry_run import dry_run
from zipc.cli.flags import SearchFlags, verb
from zipc.cli.printing import show_plan
from zipc.cli.running import Outcome, run_verb
from zipc.core.types import Progress


@verb(SearchFlags)
def plan_verb(flags: SearchFlags) -> None:
    """Find the allocation for MODEL and print it with its predicted time; writes no model."""

    def body(progress: Progress) -> Outcome:
        request = flags.request()
        require_data(request, "plan")
        if flags.dry_run:
            return dry_run(request)
        from zipc.pipeline import plan_model

        plan = plan_model(request, progress=progress)
        return Outcome(plan.to_json(), lambda console: show_plan(console, plan, request=request))

    run_verb(body, output=flags.format, resumes=not flags.dry_run)
