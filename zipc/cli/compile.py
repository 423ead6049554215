"""`zipc compile`: the whole loop."""

from __future__ import annotations

from pathlib import Path

from zipc.cli.dry_run import dry_run
from zipc.cli.flags import CompileFlags, verb
from zipc.cli.printing import show_manifest
from zipc.cli.running import Outcome, run_verb
from zipc.core.errors import UsageError
from zipc.core.request import Request
from zipc.core.types import Progress, VerdictName


@verb(CompileFlags)
def compile_verb(flags: CompileFlags) -> None:
    """Compile MODEL to the speedup asked for, and prove it by measuring."""

    def body(progress: Progress) -> Outcome:
        request = flags.request()
        out = _require_data_and_output(request)
        if flags.dry_run:
            return dry_run(request)
        from zipc.pipeline import compile_model

        manifest = compile_model(request, progress=progress)
        return Outcome(
            manifest.to_json(),
            lambda console: show_manifest(console, manifest, out=out),
            verdict_exit_code(manifest.verdict, require=request.require),
        )

    run_verb(body, output=flags.format, resumes=not flags.dry_run)


def verdict_exit_code(verdict: VerdictName, *, require: str | None) -> int:
    """0 kept or predicted, 1 missed (or predicted where `require` wants more), 3 inconclusive."""
    if verdict == "predicted":
        return 1 if require == "validated" else 0
    return {"validated": 0, "missed": 1, "inconclusive": 3}[verdict]


def _require_data_and_output(request: Request) -> Path:
    require_data(request, "compile")
    if request.output is None:
        raise UsageError("Where should the result go? Give a folder: -o OUT.")
    return request.output


def require_data(request: Request, name: str) -> None:
    """Refuse a request without data, saying what is needed and why."""
    if request.data is None:
        raise UsageError(
            f"{name} needs --data: texts (csv, tsv, jsonl, txt), a folder of images, or arrays "
            "(npz), a few hundred or more like those the model will see. They decide what can be "
            "removed without harm; labels are optional and only serve the report. To try it with a "
            "model of texts: --data examples/stsb."
        )
