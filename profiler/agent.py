"""Times graphs on the machine it runs on, and says what that machine is.

The same for this machine and for a board over ssh: it is sent as text, with `facts.py` and
`trtexec.py`, to a Python of 3.8 or newer, needs nothing beside the standard library to start, and
times with the runtime and numpy, or the trtexec, that it finds there. Commands come on standard
input, each a line of JSON followed by as many bytes as it says; each is answered by one line of
JSON.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import select
import signal
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter_ns
from typing import Any, BinaryIO

from zipc.profiler.facts import (
    Failure,
    examine,
    fingerprint,
    machine,
    one_line,
    refuse_old,
    room,
    state,
    version_of,
)

GREETING = "zipc-agent-5"  # raised with every change of what is said
MAX_ID = 8  # random token ids stay below the size of any vocabulary (those of letters have ~30)
PROVIDERS = ["CPUExecutionProvider"]
TITLES = {  # those that time graphs here
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "torch": "torch",
    "torch-cuda": "torch on CUDA",
}
PRECISION = "INFERENCE_PRECISION_HINT"


def serve(commands: BinaryIO, answers: BinaryIO) -> None:
    """Answer commands until there are no more."""
    _say(answers, {GREETING: platform.python_version()})

    def hung_up(seconds: float) -> bool:
        """Between a command and its answer nothing comes, but the end."""
        return bool(select.select([commands], [], [], seconds)[0])

    with contextlib.closing(Agent(hung_up)) as agent:
        for line in iter(commands.readline, b""):
            command = json.loads(line)
            content = _read_exactly(commands, command["bytes"])
            try:
                answer = {"value": agent.answer(command, content)}
            except Failure as failure:
                answer = {"error": str(failure), "kind": failure.kind}
            except OSError as error:
                answer = {"error": f"{one_line(error)}. {room()}", "kind": "RemoteError"}
            _say(answers, answer)


class Agent:
    """The graphs held between commands."""

    def __init__(self, hung_up: Callable[[float], bool]) -> None:
        self._hung_up = hung_up
        self._graphs: dict[int, Any] = {}
        self._tensorrt: Any = None

    def close(self) -> None:
        if self._tensorrt is not None:
            self._tensorrt.close()

    def answer(self, command: dict[str, Any], content: bytes) -> Any:
        for dropped in command["drop"]:
            self._graphs.pop(dropped, None)
        what = command["do"]
        if what == "load":
            self._graphs[command["graph"]] = self._load(command, content)
            return None
        if what == "run":
            return self._graphs[command["graph"]].run()
        if what == "series":
            graphs = [self._graphs[number] for number in command["graphs"]]
            series = graphs[0].series
            return series(graphs, rounds=command["rounds"], untimed=command["untimed"])
        if what == "layers":
            return self._graphs[command["graph"]].layers()
        if what == "warnings":
            return [] if self._tensorrt is None else self._tensorrt.warnings
        if what == "fingerprint":
            return {**fingerprint(command["runtime"]), "machine": machine()}
        if what == "state":
            return state()
        if what == "examine":
            return examine()
        raise Failure(f"There is no command {what!r}.", "RemoteError")

    def _load(self, command: dict[str, Any], content: bytes) -> Any:
        runtime = command["runtime"]
        if runtime != "tensorrt":
            return Session(content, command["options"], command["inputs"], runtime=runtime)
        if self._tensorrt is None:
            from zipc.profiler.trtexec import TensorRt

            self._tensorrt = TensorRt(self._hung_up)
        return self._tensorrt.load(content, command["options"], command["inputs"])


class Session:
    """A graph in a runtime, fed with inputs of given shapes."""

    def __init__(
        self,
        model: bytes,
        options: dict[str, Any],
        inputs: dict[str, dict[str, Any]],
        *,
        runtime: str,
    ) -> None:
        title = TITLES[runtime]
        self._runtime = runtime
        try:
            self._session = OPENERS[runtime](model, options)
        except ImportError as error:
            raise Failure(
                f"{sys.executable} has no {title} ({error}). Run there: {sys.executable} "
                f"-m pip install {runtime}; or name a Python that has it with --host-python.",
                "RemoteError",
            ) from error
        except Failure:
            raise
        except Exception as error:  # errors of runtimes share no base
            refuse_old(runtime)
            raise Failure(
                f"{title} {version_of(runtime)} cannot load the graph: {one_line(error)}. "
                f"Export it again, or install the {title} it was made for."
            ) from None
        self._feeds = {
            name: values(name, wanted["shape"], wanted["dtype"]) for name, wanted in inputs.items()
        }

    def run(self) -> float:
        """Do one inference and return its milliseconds."""
        try:
            return one_inference(self._session, self._feeds)
        except Exception as error:  # errors of runtimes share no base
            raise Failure(
                f"{TITLES[self._runtime]} {version_of(self._runtime)} cannot run the graph: "
                f"{one_line(error)}. "
                "A sequence may be longer than the graph takes: give a smaller --sequence-length."
            ) from None

    @staticmethod
    def series(graphs: Sequence[Session], *, rounds: int, untimed: int) -> list[list[float]]:
        return alternate([graph.run for graph in graphs], rounds=rounds, untimed=untimed)


def alternate(
    runs: Sequence[Callable[[], float]],
    *,
    rounds: int,
    untimed: int,
    on_round: Callable[[], object] | None = None,
) -> list[list[float]]:
    """Call timed functions in turns and return what each gave, in order.

    Each kept time directly follows `untimed` calls of the same function, so that the cache is its
    own; every other round goes backwards, so that a drift favours nobody.
    """
    samples: list[list[float]] = [[] for _ in runs]
    with no_collection():
        for number in range(rounds):
            order = range(len(runs))
            for index in order if number % 2 == 0 else reversed(order):
                for _ in range(untimed):
                    runs[index]()
                samples[index].append(runs[index]())
            if on_round is not None:
                on_round()
    return samples


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage collector out of what is timed."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def open_session(model: Any, options: Mapping[str, Any]) -> Any:
    """Open an ONNX Runtime session of a path or bytes; `session.` entries are configuration."""
    import onnxruntime as ort

    opened = ort.SessionOptions()
    opened.log_severity_level = 4  # errors are raised, and need no second voice
    for key, value in options.items():
        if key.startswith("session."):
            opened.add_session_config_entry(key, value)
        else:
            setattr(opened, key, value)
    return ort.InferenceSession(model, opened, providers=PROVIDERS)


class OpenVinoSession:
    """A graph that OpenVINO has compiled for the CPU; it is run as an ONNX Runtime session is."""

    def __init__(self, model: Any, options: Mapping[str, Any]) -> None:
        import openvino

        core = openvino.Core()
        self.compiled = core.compile_model(core.read_model(model), "CPU", dict(options))
        wanted = options[PRECISION]
        found = self.compiled.get_property(PRECISION)
        if found != getattr(openvino.Type, wanted):
            raise Failure(
                f"OpenVINO {version_of('openvino')} was asked for {wanted} and computes in "
                f"{found.get_type_name()}: its times would be of another network. Use --runtime "
                "onnxruntime."
            )
        # A value may have further names; those of inputs that nothing reads are gone.
        self.inputs = [port.get_node().get_friendly_name() for port in self.compiled.inputs]
        self._request = self.compiled.create_infer_request()

    def run(self, _: None, feeds: Mapping[str, Any]) -> None:
        """Do one inference; nothing is copied, in or out."""
        taken = [feeds[name] for name in self.inputs]
        self._request.infer(taken, share_inputs=True, share_outputs=True)


def open_torch(model: bytes, options: Mapping[str, Any]) -> Any:
    """A graph in torch, which takes more of zipc than a board is sent."""
    from zipc.profiler.runners.torch_graph import TorchGraph

    return TorchGraph(model, **options)


OPENERS = {
    "onnxruntime": open_session,
    "openvino": OpenVinoSession,
    "torch": open_torch,
    "torch-cuda": open_torch,
}


def one_inference(session: Any, feeds: Mapping[str, Any]) -> float:
    """Run a session once; milliseconds."""
    start = perf_counter_ns()
    session.run(None, feeds)
    return (perf_counter_ns() - start) / 1e6


def values(name: str, shape: Sequence[int], dtype: str, seed: int = 0) -> Any:
    """Make the data of an input as a numpy array; it depends on its name and the seed only."""
    import numpy as np

    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    kind = np.dtype(dtype)
    if np.issubdtype(kind, np.floating) and "mask" not in name:
        return rng.standard_normal(shape).astype(kind)
    if "mask" in name:
        return np.ones(shape, kind)
    if name == "position_ids":
        return np.broadcast_to(np.arange(shape[-1], dtype=kind), shape).copy()
    if name.endswith("ids") and name != "token_type_ids":
        return rng.integers(1, MAX_ID, shape).astype(kind)
    return np.zeros(shape, kind)


def _read_exactly(stream: BinaryIO, count: int) -> bytes:
    content = stream.read(count)
    if len(content) < count:
        raise EOFError("the connection ended in the middle of a graph")
    return content


def _say(stream: BinaryIO, document: dict[str, Any]) -> None:
    stream.write(json.dumps(document).encode() + b"\n")
    stream.flush()


def main() -> None:
    """Serve on standard input and output."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # unwinds: temporary files go
    with contextlib.suppress(BrokenPipeError, EOFError, KeyboardInterrupt):
        answers = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)  # whatever a library prints must not look like an answer
        serve(sys.stdin.buffer, answers)
