"""torch.cuda on a machine without a GPU, as far as capturing and replaying graphs goes: calls are noted, in order."""

import contextlib
import itertools

import torch


class FakeCuda:
    """Stands for torch.cuda on tensors of the CPU.

    calls: what was called. A replay runs again what was captured, into the tensors that the capture returned.
    is_capturing: what torch.cuda.is_current_stream_capturing says.
    """

    def __init__(self, monkeypatch):
        self.calls, self.graphs, self.is_capturing = [], [], False
        self._numbers = itertools.count()
        cuda = self

        class Stream:
            def __init__(self):
                self.name = f"stream {next(cuda._numbers)}"
                cuda.calls.append(f"new {self.name}")

            def wait_stream(self, other):
                cuda.calls.append(f"{self.name} waits for {other.name}")

            def wait_event(self, event):
                cuda.calls.append(f"{self.name} waits for {event.name}")

        class Event:
            def __init__(self):
                self.name = f"event {next(cuda._numbers)}"

            def record(self, stream):
                cuda.calls.append(f"{stream.name} records {self.name}")

            def synchronize(self):
                cuda.calls.append(f"{self.name} is waited for")

        class Graph:
            def __init__(self):
                self.replays = None
                cuda.graphs.append(self)

            def replay(self):
                cuda.calls.append("replay")
                self.replays()

        @contextlib.contextmanager
        def graph(graph, **options):
            cuda.calls.append(f"capture begins on {options['stream'].name}")
            cuda.options = options
            try:
                yield
            finally:
                cuda.calls.append("capture ends")

        class Current(Stream):
            def __init__(self):
                self.name = "current stream"

        for name, fake in dict(
            Stream=Stream, Event=Event, CUDAGraph=Graph, graph=graph, current_stream=Current,
            stream=lambda stream: contextlib.nullcontext(), device=lambda device: contextlib.nullcontext(),
            is_current_stream_capturing=lambda: self.is_capturing,
            graph_pool_handle=lambda: ("pool", next(self._numbers)),
        ).items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(
            torch._C, "_cuda_clearCublasWorkspaces", lambda: self.calls.append("workspaces cleared"), raising=False
        )
