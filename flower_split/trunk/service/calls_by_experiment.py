"""Each client's call goes to its own experiment: by its token, which is of one alone.

An experiment has its own sessions, quotas and shared memory, so that nothing that a client says can name
another one's. A token of no experiment gets the same answer, whatever it asks for.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import grpc

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.engine.experiments import Experiments, OneExperiment
from flower_split.trunk.service.client_calls import ClientCalls
from flower_split.trunk.service.client_certificates import UNKNOWN_TOKEN
from flower_split.trunk.service.control import CONTROL_CALLS
from flower_split.trunk.service.handlers import Answering, Context, Quotas, bearer_in
from flower_split.trunk.service.refusals import RefusalLog

_METHODS = (*sorted(CONTROL_CALLS), "Forward", "Backward", "FinishStep")

Handler = Callable[[Iterator[bytes], Context], Iterator[bytes]]


@dataclass(frozen=True, slots=True, eq=False)
class _Desk:
    """What answers the clients of one experiment."""

    calls: ClientCalls
    handlers: Mapping[str, Handler]


class CallsByExperiment:
    """The clients' calls of every experiment. Thread-safe: a lock of its own, taken last.

    Args:
        experiments: The experiments whose engines answer.
        make: Makes the calls of one engine; waits for nothing.
        refusals: Notes calls of nobody's.

    Raises:
        ConfigError: The codec of an engine that is there already is not installed.
    """

    def __init__(
        self,
        experiments: Experiments,
        make: Callable[[TrunkEngine], ClientCalls],
        refusals: RefusalLog,
    ) -> None:
        self._experiments = experiments
        self._make = make
        self._refusals = refusals
        self._lock = threading.Lock()
        self._desks: Mapping[TrunkEngine, _Desk] = MappingProxyType({})  # replaced, never changed
        for engine in experiments.engines().values():
            self._desk_of(engine)

    def experiment_of(self, token: str) -> str:
        """Return the name of the experiment that a participant's token is of; empty: of none."""
        found = self._experiments.engines().items()
        return next((name for name, engine in found if engine.knows_token(token)), "")

    def quotas_of(self, token: str) -> Quotas | None:
        """Return the quotas that a participant's calls count against; None: it is nobody's."""
        desk = self._of_token(token)
        return None if desk is None else desk.calls.quotas

    def look(self) -> None:
        """Cut off calls that take too long, and forget experiments that have gone."""
        there = set(self._experiments.engines().values())
        with self._lock:
            gone = [desk for engine, desk in self._desks.items() if engine not in there]
            self._desks = MappingProxyType({e: d for e, d in self._desks.items() if e in there})
        for desk in gone:
            desk.calls.close()
        for desk in (*self._desks.values(), *gone):
            desk.calls.quotas.end_overdue()

    def handlers(self) -> dict[str, "grpc.RpcMethodHandler[bytes, bytes]"]:
        """Return every method by its name; of a trunk of one experiment, its own."""
        if isinstance(self._experiments, OneExperiment):
            (engine,) = self._experiments.engines().values()
            return self._desk_of(engine).calls.handlers()
        return {
            name: grpc.stream_stream_rpc_method_handler(partial(self._answer, name))
            for name in _METHODS
        }

    def _answer(self, method: str, requests: Iterator[bytes], context: Context) -> Iterator[bytes]:
        desk = self._of_token(bearer_in(context.invocation_metadata()) or "")
        if desk is not None:
            return desk.handlers[method](requests, context)
        with Answering(context, method, self._refusals):
            raise TrunkRefused(RefusalReason.UNAUTHENTICATED, UNKNOWN_TOKEN)

    def _of_token(self, token: str) -> _Desk | None:
        engine = self._experiments.of_token(token)
        return None if engine is None else self._desk_of(engine)

    def _desk_of(self, engine: TrunkEngine) -> _Desk:
        desk = self._desks.get(engine)
        if desk is None:
            with self._lock:
                desk = self._desks.get(engine)
                if desk is None:
                    desk = self._new_desk(engine)
                    self._desks = MappingProxyType({**self._desks, engine: desk})
        return desk

    def _new_desk(self, engine: TrunkEngine) -> _Desk:
        calls = self._make(engine)
        handlers: dict[str, Handler] = {}
        for name, handler in calls.handlers().items():
            assert handler.stream_stream is not None, "every call of a client is served as a stream"
            handlers[name] = handler.stream_stream
        return _Desk(calls, handlers)
