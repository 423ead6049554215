"""The flags of `compile`, `plan` and `profile`, and how their strings become a `Request`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

import typer

from zipc.cli.quantities import parse_latency, parse_speedup
from zipc.cli.running import Format
from zipc.core.errors import UsageError
from zipc.core.request import Request
from zipc.core.shapes import parse_input_shapes
from zipc.core.types import InputSpec

Numerics = Literal[
    "auto", "fp32", "fp16", "bf16", "int8", "int8-dynamic", "int8-static", "int4-weights"
]
PatternChoice = Literal["auto", "2:4", "none"]
Quantizer = Literal["zipc", "modelopt"]
_WORKLOAD, _SEARCH, _DATA, _RUN = "Workload", "Search", "Reading the data", "Running"
Phase = Literal["prefill", "decode"]
Runtime = Literal["onnxruntime", "openvino", "torch", "auto"]
Effort = Literal["quick", "default", "extensive"]
FormatFlag = Annotated[
    Format, typer.Option("--format", help="table for people, json: one document on stdout.")
]
IncludeFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        help="Only sites whose name matches this glob. Repeatable.",
        metavar="GLOB",
        rich_help_panel=_SEARCH,
    ),
]
ExcludeFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        help="No site whose name matches this glob. Repeatable.",
        metavar="GLOB",
        rich_help_panel=_SEARCH,
    ),
]
WeightsFlag = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help="Weights of a model given as FILE.PY:FACTORY.",
        metavar="FILE.safetensors",
    ),
]
InputShapesFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shapes",
        help="Sizes of inputs that are not token sequences, batch first: x:1x3x224x224, "
        "ids:1x128:int64. Repeatable.",
        metavar="NAME:SIZES,...",
        rich_help_panel=_WORKLOAD,
    ),
]
HostFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--host",
        help="Measure on this board, named as ssh names it: user@board. local is this machine, for "
        "the GPU that is in it.",
        metavar="USER@BOARD",
    ),
]
HostsFlag = Annotated[
    Path | None,
    typer.Option(
        "--hosts",
        help="Measure on the boards of this file: one host a line, then its Python if it has one "
        "of its own. Like --host given more than once: all at the same time, a table each.",
        metavar="FILE",
    ),
]
HostPythonFlag = Annotated[
    str, typer.Option("--host-python", help="The board's Python that has the runtime.")
]

BuildsFlag = Annotated[
    int,
    typer.Option(
        "--builds",
        help="Build the engines on the board so many times, from nothing: what differs is luck, "
        "and the interval reaches over all.",
        metavar="N",
    ),
]


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """What is priced, and where: all that `profile` needs."""

    model: Annotated[
        str,
        typer.Argument(
            help="A local Hugging Face folder, a hub id, the alias minilm, or FILE.PY:FACTORY.",
            metavar="MODEL",
            show_default=False,
        ),
    ]
    weights: WeightsFlag = None
    target: Annotated[
        str, typer.Option("--target", help="A built-in target, or the path of a .toml file.")
    ] = "cpu"
    runtime: Annotated[
        Runtime | None,
        typer.Option(
            "--runtime",
            help="What runs the graph on a processor: that of the target, or the one named; auto "
            "times the dense model under both and takes the faster.",
            show_default=False,
        ),
    ] = None
    host: HostFlag = None
    host_python: HostPythonFlag = "python3"
    numerics: Annotated[
        Numerics,
        typer.Option(
            "--numerics",
            "--precision",
            help="Which precisions the search may choose from; int4-weights is for --phase decode "
            "under ONNX Runtime, bf16 for OpenVINO.",
            rich_help_panel=_SEARCH,
        ),
    ] = "auto"
    include: IncludeFlag = None
    exclude: ExcludeFlag = None
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            min=1,
            help="Threads the runtime may use. Without it one is timed, and a speedup must hold "
            "under the runtime's default options too.",
            rich_help_panel=_WORKLOAD,
        ),
    ] = None
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Batch timed.", rich_help_panel=_WORKLOAD)
    ] = 1
    sequence_length: Annotated[
        int | None,
        typer.Option(
            "--sequence-length",
            min=1,
            help="Tokens per sequence timed: 128, or the most the model takes.",
            rich_help_panel=_WORKLOAD,
        ),
    ] = None
    phase: Annotated[
        Phase,
        typer.Option(
            "--phase",
            help="What of a language model is timed: reading a prompt, or one token more.",
            rich_help_panel=_WORKLOAD,
        ),
    ] = "prefill"
    past_length: Annotated[
        int | None,
        typer.Option(
            "--past-length",
            min=1,
            help="Tokens before the one decoded: 128, or the most the model takes.",
            rich_help_panel=_WORKLOAD,
        ),
    ] = None
    input_shapes: InputShapesFlag = None
    effort: Annotated[
        Effort,
        typer.Option("--effort", help="How long to measure and to search.", rich_help_panel=_RUN),
    ] = "default"
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seed of everything random.", rich_help_panel=_RUN)
    ] = 0
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            "--cache-dir", help="Where tables and finished stages are kept.", rich_help_panel=_RUN
        ),
    ] = None
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check the request, print it, and stop.", rich_help_panel=_RUN
        ),
    ] = False
    format: FormatFlag = "table"

    def request(self) -> Request:
        """Convert the strings.

        Raises:
            UsageError: one of them means nothing, or two exclude each other.
        """
        return Request(**self._fields())

    def _board(self) -> dict[str, Any]:
        return {"host": one_host(self.host, self.host_python), "host_python": self.host_python}

    def _fields(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "target": self.target,
            "runtime": self.runtime,
            **self._board(),
            "numerics": self.numerics,
            "include": tuple(self.include or ()),
            "exclude": tuple(self.exclude or ()),
            "threads": self.threads,
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
            "phase": self.phase,
            "past_length": self.past_length,
            "input_shapes": read_shapes(self.input_shapes),
            "weights": self.weights,
            "effort": self.effort,
            "seed": self.seed,
            "cache_dir": self.cache_dir,
        }


@dataclass(frozen=True, kw_only=True)
class SearchFlags(ModelFlags):
    """What is asked for, and how quality is read: all that `plan` needs."""

    GOALS: ClassVar[str] = "--speedup 2x or --latency 5ms"

    speedup: Annotated[
        str | None,
        typer.Option("--speedup", help="How many times faster than the dense model, e.g. 2x."),
    ] = None
    latency: Annotated[
        str | None,
        typer.Option("--latency", help="Latency to reach instead of a speedup, e.g. 5ms."),
    ] = None
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="What the model will see: texts (csv, tsv, jsonl, txt), a folder of images, "
            "or arrays by input name (npz).",
        ),
    ] = None
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            help="Metric of the report, e.g. spearman, accuracy, perplexity.",
            metavar="NAME",
            rich_help_panel=_DATA,
        ),
    ] = None
    evaluator: Annotated[
        str | None,
        typer.Option(
            "--eval",
            help="Your own metric; the file is run.",
            metavar="FILE.PY:FUNCTION",
            rich_help_panel=_DATA,
        ),
    ] = None
    text_column: Annotated[
        list[str] | None,
        typer.Option(
            "--text-column",
            help="Column that holds a text. Repeatable.",
            metavar="NAME",
            rich_help_panel=_DATA,
        ),
    ] = None
    label_column: Annotated[
        str | None,
        typer.Option(
            "--label-column",
            help="Column that holds the label.",
            metavar="NAME",
            rich_help_panel=_DATA,
        ),
    ] = None
    pattern: Annotated[
        PatternChoice,
        typer.Option(
            "--pattern",
            help="2:4 weights, for sparse tensor cores: where the search finds that they pay, "
            "at every site that can have them, or nowhere.",
            rich_help_panel=_SEARCH,
        ),
    ] = "auto"
    quantizer: Annotated[
        Quantizer,
        typer.Option(
            "--quantizer",
            help="Who chooses INT8 ranges and rounds: zipc, or NVIDIA's Model Optimizer.",
            rich_help_panel=_SEARCH,
        ),
    ] = "zipc"
    no_prune: Annotated[
        bool,
        typer.Option(
            "--no-prune",
            help="Change the precision only; --speedup is optional.",
            rich_help_panel=_SEARCH,
        ),
    ] = False
    recover: Annotated[
        Literal["none"],
        typer.Option("--recover", help="How quality is trained back.", rich_help_panel=_SEARCH),
    ] = "none"
    allow_table_mismatch: Annotated[
        bool,
        typer.Option(
            "--allow-table-mismatch",
            help="Use a latency table of another device; it is reported.",
            rich_help_panel=_RUN,
        ),
    ] = False

    def _fields(self) -> dict[str, Any]:
        goals = self._goals()
        if len(goals) > 1:
            raise UsageError(f"{' and '.join(goals)} are goals of their own: give one of them.")
        if not goals and not self.no_prune:
            raise UsageError(
                f"How fast should it be? Give {self.GOALS} (--no-prune alone needs none)."
            )
        return super()._fields() | {
            "speedup": None if self.speedup is None else parse_speedup(self.speedup),
            "latency_ms": None if self.latency is None else parse_latency(self.latency),
            "data": self.data,
            "metric": self.metric,
            "evaluator": self.evaluator,
            "text_columns": tuple(self.text_column or ()),
            "label_column": self.label_column,
            "pattern": self.pattern,
            "quantizer": self.quantizer,
            "prune": not self.no_prune,
            "recover": self.recover,
            "allow_table_mismatch": self.allow_table_mismatch,
        }

    def _goals(self) -> list[str]:
        """The flags that say how fast it should be."""
        given = {"--speedup": self.speedup, "--latency": self.latency}
        return [flag for flag, value in given.items() if value is not None]


@dataclass(frozen=True, kw_only=True)
class CompileFlags(SearchFlags):
    """What is written, and when the result counts as a success."""

    GOALS: ClassVar[str] = "--speedup 2x, --latency 5ms or --max-drop 0.5"

    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            help="Instead of --speedup: as fast as can be while the metric is at most so many "
            "points worse on held-out rows, e.g. 0.5.",
            show_default=False,
        ),
    ] = None
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder the result is written to.")
    ] = None
    no_reference: Annotated[
        bool, typer.Option("--no-reference", help="Leave out reference.onnx; bench needs it.")
    ] = False
    engine: Annotated[
        Literal["auto", "trt", "trtexec", "rtx"] | None,
        typer.Option(
            "--engine",
            help="Build an engine for the target's GPU: with TensorRT's Python package or trtexec, "
            "where that GPU is here, or with TensorRT-RTX, which needs none. Nothing runs it: "
            "OUT/build.sh builds and times one on the device.",
        ),
    ] = None
    engine_options: Annotated[
        str,
        typer.Option(
            "--engine-options",
            help="What that engine, and those of OUT/build.sh, are built to be: refit, "
            "version-compatible, level=0 to level=5, with commas.",
            show_default=False,
        ),
    ] = ""
    layout: Annotated[
        Literal["triton"] | None,
        typer.Option("--layout", help="Also write a model repository for Triton."),
    ] = None
    require: Annotated[
        Literal["validated"] | None,
        typer.Option("--require", help="Exit 1 unless the verdict is this one."),
    ] = None

    def _fields(self) -> dict[str, Any]:
        return super()._fields() | {
            "max_drop": self.max_drop,
            "output": self.output,
            "keep_reference": not self.no_reference,
            "engine": self.engine,
            "engine_options": self.engine_options,
            "layout": self.layout,
            "require": self.require,
        }

    def _goals(self) -> list[str]:
        return super()._goals() + ([] if self.max_drop is None else ["--max-drop"])


def read_shapes(given: list[str] | None) -> tuple[InputSpec, ...]:
    """The inputs of a flag that may be repeated.

    Raises:
        UsageError: see `parse_input_shapes`.
    """
    return parse_input_shapes(",".join(given)) if given else ()


def one_host(hosts: list[str] | None, python: str) -> str | None:
    """The board of a verb that measures on one.

    Raises:
        UsageError: there are more, or a Python is named and no board.
    """
    refuse_python_alone(hosts, python)
    if hosts and len(hosts) > 1:
        raise UsageError(
            f"--host is given {len(hosts)} times. Only zipc profile takes several boards: give one."
        )
    return hosts[0] if hosts else None


def refuse_python_alone(boards: Sequence[Any] | None, python: str) -> None:
    """Refuse the Python of a board where none is named.

    Raises:
        UsageError: it is.
    """
    if python != "python3" and not boards:
        raise UsageError(
            f"--host-python {python} is the Python of a board: name that with --host, too."
        )


def read_hosts(path: Path, *, python: str) -> list[tuple[str, str]]:
    """The boards of a file and their Pythons, `python` where a line names none; `#` is a comment.

    Raises:
        UsageError: it cannot be read, names no board, or a line has more than two words.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = [line.partition("#")[0].split() for line in text.splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--hosts {path} cannot be read: {error}.") from error
    found = [words for words in lines if words]
    strange = [" ".join(words) for words in found if len(words) > 2]
    if strange or not found:
        what = f"has the line {strange[0]!r}" if strange else "names no board"
        raise UsageError(
            f"--hosts {path} {what}. Write one host a line: user@board, then a Python."
        )
    return [(words[0], words[1] if len(words) > 1 else python) for words in found]


def verb(flags: type[ModelFlags]) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Give a function of one flags object the signature typer reads its options from."""

    def wrap(function: Callable[[Any], None]) -> Callable[..., None]:
        hints = get_type_hints(flags, include_extras=True)
        parameters = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                annotation=hints[field.name],
                default=getattr(flags, field.name, inspect.Parameter.empty),
            )
            for field in fields(flags)
        ]

        def command(**values: Any) -> None:
            function(flags(**values))

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__setattr__("__signature__", inspect.Signature(parameters))
        return command

    return wrap
