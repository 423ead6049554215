"""The nouns of zipc, as small frozen dataclasses without any framework import."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

Numeric = str  # name of a registered scheme: "fp32", "bf16", "int8-dynamic", "int4-weights"
LONGEST_MS = 1e9  # of an inference: twelve days
NUMERICS = ("fp32", "fp16", "bf16", "int8-dynamic", "int8-static", "int4-weights")
Pattern = Literal["dense", "2:4"]
Difference = Literal["width", "bf16", "int8", "int4", "2:4"]  # in what two graphs differ
NARROW: tuple[Difference, ...] = ("bf16", "int8", "int4")  # numerics of a level begin with one
TableKind = Literal["measured", "published", "modelled"]
VerdictName = Literal["validated", "predicted", "missed", "inconclusive"]
ModelTask = Literal["embedding", "classes", "regression", "causal_lm", "image_classes", "tensors"]


@dataclass(frozen=True, slots=True)
class SpecSheet:
    """What a GPU could reach, from its data sheet: dense rates; 2:4 doubles those of tensor cores.

    `anchors` names the family whose published latencies its model was fitted to, `source` where
    the figures stand.
    """

    compute_capability: str
    multiprocessors: int
    fp32_tflops: float
    fp16_tflops: float
    int8_tops: float
    bandwidth_gbs: float
    l2_mb: float
    sparse: bool
    anchors: str
    source: tuple[str, ...]

    @property
    def sm(self) -> str:
        """The compute capability as compilers name it, "sm80"."""
        return "sm" + self.compute_capability.replace(".", "")


@dataclass(frozen=True, slots=True)
class Target:
    """A device with its runtime: what it can run and on which widths it runs well."""

    name: str
    runtime: str
    numerics: tuple[Numeric, ...]
    reference_numeric: Numeric = "fp32"
    patterns: tuple[Pattern, ...] = ("dense",)
    width_step: int = 32  # finest FFN width grid offered; the table decides what of it pays
    connection: str = "local"
    description: str = ""
    width_grid: Mapping[str, int] = field(default_factory=dict, hash=False)
    sheet: SpecSheet | None = None  # of a device that may be absent: its latency is modelled
    mode: str = ""  # power mode

    @property
    def only_dense(self) -> str | None:
        """Why weights are not made 2:4 here; None where they may be."""
        if "2:4" in self.patterns:
            return None
        if self.sheet is None:
            return f"the kernels of {self.runtime} multiply zeros like any other number"
        if not self.sheet.sparse:
            return f"compute capability {self.sheet.compute_capability} has no sparse tensor cores"
        return "the file of the target does not list it under patterns"

    @property
    def signed(self) -> bool:
        """Whether its runtime knows symmetric integers only."""
        return self.runtime == "tensorrt"

    def on_grid(self, level: Level) -> bool:
        """Whether the width suits its numeric and pattern: others are padded, or far slower."""
        steps = (self.width_grid.get(name, 1) for name in (level.numeric, level.pattern))
        return all(level.width % step == 0 for step in steps)


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of a model: sizes are numbers, or names of axes that stay open."""

    name: str
    dtype: str  # as torch spells it: "float32", "int64"
    shape: tuple[int | str, ...]
    high: int | None = None  # integers lie below it

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        return f"{self.name}:{sizes}" + ("" if self.dtype == "float32" else f":{self.dtype}")


@dataclass(frozen=True, slots=True)
class Workload:
    """What is timed: the sizes of the inputs and the number of threads.

    A model of texts is given a batch and a sequence length; where these do not say all,
    `input_shapes` has the whole shape of every input. `past_length` is the number of tokens in the
    cache of a decode step.
    """

    batch_size: int = 1
    sequence_length: int | None = 128  # None: no input has a sequence axis
    threads: int = 1
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    past_length: int | None = None

    @property
    def key(self) -> str:
        shapes = "".join(f"-{n}-{_sizes(shape)}-" for n, shape in self.input_shapes.items())
        if len(shapes) > 80:
            shapes = f"-{hashlib.sha256(shapes.encode()).hexdigest()[:16]}-"
        length = "" if self.sequence_length is None else f"s{self.sequence_length}"
        past = "" if self.past_length is None else f"p{self.past_length}"
        return f"b{self.batch_size}{length}{past}{shapes}t{self.threads}"

    @property
    def axes(self) -> dict[str, int]:
        """The size of every axis that has a name."""
        sizes = {
            "batch": self.batch_size,
            "sequence": self.sequence_length,
            "decoder_sequence": self.sequence_length,
            "past": self.past_length,
        }
        return {name: size for name, size in sizes.items() if size is not None}

    @property
    def flags(self) -> str:
        """The flags of the command line that ask for this workload."""
        sizes = f"--batch-size {self.batch_size}"
        if self.input_shapes:
            shapes = ",".join(f"{n}:{_sizes(shape)}" for n, shape in self.input_shapes.items())
            sizes = f"--input-shapes {shapes}"
        elif self.past_length is not None:
            sizes += f" --phase decode --past-length {self.past_length}"
        elif self.sequence_length is not None:
            sizes += f" --sequence-length {self.sequence_length}"
        return f"{sizes} --threads {self.threads}"

    def __str__(self) -> str:
        parts = [f"batch {self.batch_size}"]
        if self.past_length is not None:
            parts.append(f"1 token after {self.past_length}")
        elif self.sequence_length is not None:
            parts.append(f"sequence {self.sequence_length}")
        parts += [f"{n} {_sizes(shape)}" for n, shape in self.input_shapes.items()]
        return ", ".join([*parts, f"{self.threads} thread{'s' if self.threads > 1 else ''}"])


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


@dataclass(frozen=True, slots=True, order=True)
class Level:
    """One state of a site: units kept, sparsity pattern, numeric. Width 0 removes the site."""

    width: int
    numeric: Numeric = "fp32"
    pattern: Pattern = "dense"

    @property
    def removed(self) -> bool:
        return self.width == 0

    @property
    def differs(self) -> tuple[Difference, ...]:
        """In what, beside its width, it differs from plain floats."""
        numeric = tuple(kind for kind in NARROW if self.numeric.startswith(kind))
        return (*numeric, "2:4") if self.pattern == "2:4" else numeric

    def without(self, kind: Difference) -> Level:
        """The same but for one of the things it `differs` in."""
        return replace(self, pattern="dense") if kind == "2:4" else replace(self, numeric="fp32")

    def within(self, numeric: Numeric) -> Level:
        """The same in a network that runs in `numeric` as a whole, if the level is in fp32."""
        return self if self.removed or self.numeric != "fp32" else replace(self, numeric=numeric)

    def beside(self, numeric: Numeric) -> Level:
        """The inverse of `within`: in fp32 where it has the numeric of the whole network."""
        return replace(self, numeric="fp32") if self.numeric == numeric else self

    def __str__(self) -> str:
        if self.removed:
            return "removed"
        tail = "" if self.pattern == "dense" else f"+{self.pattern}"
        return f"{self.width}@{self.numeric}{tail}"


Share = tuple[int, int]  # what is left, and what there was, of the known factors of a size
Index = tuple[tuple[int, ...], ...]  # unit -> its positions along a dimension, ascending


@dataclass(frozen=True, slots=True)
class Slice:
    """What the units of a site own along one dimension of one tensor."""

    parameter: str  # qualified name, e.g. "encoder.layer.0.attention.self.query.weight"
    dim: int
    index: Index


@dataclass(frozen=True, slots=True)
class Consumer:
    """A map that contracts over the units: evidence is taken at its input.

    `index` are channels of that input; a channel stands for `kernel` columns of the map's matrix.
    """

    module: str
    index: Index
    kernel: int = 1

    def columns(self, units: Iterable[int]) -> list[int]:
        """Columns of the map's matrix (out, channels x kernel) that `units` own."""
        k = self.kernel
        return [c * k + j for u in units for c in self.index[u] for j in range(k)]


@dataclass(frozen=True, slots=True)
class Expert:
    """What goes with one expert of a mixture."""

    modules: tuple[str, ...]  # paths of the modules that compute it
    ends: tuple[str, ...]  # the last maps of these: zeros for tokens of other experts
    picks: tuple[str, ...]  # traced nodes that take its share out of those of all experts


Kind = Literal["heads", "ffn", "channels", "width", "experts", "map"]


@dataclass(frozen=True, slots=True)
class Site:
    """One decision point: `units` removable groups of coupled slices.

    A "map" is a single unit that stays: only its numeric and pattern are chosen.
    """

    name: str
    kind: Kind
    units: int
    slices: tuple[Slice, ...]
    consumers: tuple[Consumer, ...]
    producers: tuple[str, ...]  # module paths whose output carries the units
    signature: str  # equal for sites that cost the same at equal levels
    calls: int = 1  # how often the shared modules run in one forward pass
    removable: bool = True  # its consumers read nothing else: without units they are constants
    normed: bool = False  # norms run over the units: their statistics are those of what is left
    experts: tuple[Expert, ...] = ()  # by unit, where units are experts
    chosen: int = 0  # experts that every token is sent to: no fewer can be left

    @property
    def least(self) -> int:
        """Fewest units that may be left; a norm over one value would give the same for all."""
        return max(self.chosen, 2 * self.normed, int(not self.removable))

    @property
    def maps(self) -> tuple[str, ...]:
        """Module paths of its producers and consumers, each once."""
        return tuple(dict.fromkeys((*self.producers, *(c.module for c in self.consumers))))


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """A part that could not be pruned, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Rung:
    """A level of a ladder with its price and its error."""

    level: Level
    ms: float
    error: float  # squared output error at the consumer, relative to its dense output


@dataclass(frozen=True, slots=True)
class Ladder:
    """All levels of one site, and the order in which its units go."""

    site: str
    order: tuple[int, ...]  # units in order of elimination: the first entry goes first
    rungs: tuple[Rung, ...]

    def kept(self, width: int) -> tuple[int, ...]:
        """Units kept at `width`, ascending."""
        return tuple(sorted(self.order[len(self.order) - width :]))


@dataclass(frozen=True, slots=True)
class Allocation:
    """One level per site, with what it is predicted to cost."""

    levels: Mapping[str, Level]
    predicted_ms: float
    predicted_error: float

    @property
    def widths(self) -> dict[str, int]:
        """Units kept, by site."""
        return {name: level.width for name, level in self.levels.items()}

    @property
    def key(self) -> tuple[tuple[str, Level], ...]:
        return tuple(sorted(self.levels.items()))

    def undiminished(self, sites: Mapping[str, Site]) -> bool:
        """Whether every site has all its units, dense and in the numeric of the whole network."""
        return all(lv.width == sites[n].units and not lv.differs for n, lv in self.levels.items())


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file of the output folder."""

    path: str
    kind: str
    sha256: str


@dataclass(frozen=True, slots=True)
class PairedTiming:
    """Reference and candidate timed alternately in one run; speedup = reference / candidate."""

    reference_ms: tuple[float, ...]
    candidate_ms: tuple[float, ...]
    speedup: float
    ci95: tuple[float, float]
    inconclusive: bool = False  # the interval is too wide to decide anything
    loads: int = 1  # how often both were loaded anew, for as many samples each time
    notes: tuple[str, ...] = field(default=())


class Runner(Protocol):
    """Something that can be timed. `run` does one inference and returns its milliseconds."""

    def run(self) -> float: ...


class Progress(Protocol):
    """Where a stage reports to; the CLI draws it, a program may ignore it."""

    def stage(self, name: str, total: int | None = None) -> None: ...
    def advance(self, steps: int = 1, note: str = "") -> None: ...
    def info(self, message: str) -> None: ...
    def done(self, note: str = "") -> None: ...


class Silent:
    """A `Progress` that says nothing."""

    def stage(self, name: str, total: int | None = None) -> None: ...
    def advance(self, steps: int = 1, note: str = "") -> None: ...
    def info(self, message: str) -> None: ...
    def done(self, note: str = "") -> None: ...
