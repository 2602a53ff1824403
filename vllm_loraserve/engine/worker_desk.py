"""The agent's questions to the workers, asked beside the engine.

vLLM's own way, `collective_rpc`, goes through the engine's queue and the worker's main thread: an answer waits for the
step that runs, and a worker that was asked looks for the next message without sleeping for a second, on a whole core.
So each worker has a socket and a side thread of its own for them. Engines of several machines, or several engines
behind one server (data parallel), are asked by `collective_rpc`; the questions are the same (`worker_extension.py`).
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from vllm.logger import init_logger

from vllm_loraserve.engine import channel
from vllm_loraserve.engine.worker_extension import QUESTIONS, WorkerExtension

logger = init_logger("vllm.loraserve.worker_desk")

ANSWER_S = 10.0
"""No question takes so long: the worker is gone."""


class Question(msgspec.Struct, frozen=True, array_like=True):
    """One of QUESTIONS and its arguments."""

    method: str
    args: list[Any] = []


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """What it returned; `error`: what it raised instead."""

    value: Any = None
    error: str = ""


_encode = msgspec.msgpack.Encoder().encode
_decode_question = msgspec.msgpack.Decoder(Question).decode
_decode_answer = msgspec.msgpack.Decoder(Answer).decode


def addresses(vllm_config: Any) -> list[str] | None:
    """Of each worker's desk, by rank; None where they are asked by `collective_rpc`."""
    parallel = vllm_config.parallel_config
    base = None if parallel.data_parallel_size > 1 else channel.address_of(vllm_config, "desk")
    if base is None:
        return None
    return [f"{base}-{rank}" for rank in range(parallel.world_size)]


class WorkerDesk(WorkerExtension):
    """A worker's end: one daemon thread that answers, while the worker's own thread runs steps."""

    def __init__(self, address: str, manager: Any) -> None:
        self._manager = manager
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)
        threading.Thread(target=self._run, name="loraserve-desk", daemon=True).start()

    def _loraserve_manager(self) -> Any:
        return self._manager

    def _run(self) -> None:
        while True:
            peer, number, body = self._socket.recv_multipart()
            self._socket.send_multipart([peer, number, _encode(self._answer(body))])

    def _answer(self, body: bytes) -> Answer:
        try:
            question = _decode_question(body)
            if question.method not in QUESTIONS:
                return Answer(error=f"no question called {question.method!r}")
            return Answer(getattr(self, question.method)(*question.args))
        except Exception as error:
            logger.exception("A question of the agent could not be answered")
            return Answer(error=f"{type(error).__name__}: {error}")


class Workers:
    """The agent's end. Coroutines of one event loop."""

    def __init__(self, engine_client: Any, vllm_config: Any) -> None:
        self._engine = engine_client
        self._addresses = addresses(vllm_config)
        self._sockets: list[zmq.asyncio.Socket] = []
        self._numbers = itertools.count(1)
        self._one_at_a_time = asyncio.Lock()
        self._heard = False
        """A desk has answered once."""

    @property
    def beside_the_engine(self) -> bool:
        """Whether the workers have desks, whatever worker extension was asked for."""
        return self._addresses is not None

    async def ask(self, method: str, *args: Any) -> list[Any]:
        """The answer of every worker, by rank, to one of QUESTIONS.

        Raises RuntimeError with what a worker raised, TimeoutError where one does not answer.
        """
        if self._addresses is not None:
            try:
                return await self._ask_desks(self._addresses, method, args)
            except TimeoutError:
                if self._heard:
                    raise
                # An executor may have put the workers on other machines without saying so in the configuration.
                logger.warning("No worker answers beside the engine: they are asked through it from now on.")
                self._addresses = None
                self.close()
        answers: list[Any] = await self._engine.collective_rpc(method, args=args)
        return answers

    async def _ask_desks(self, addresses: list[str], method: str, args: tuple[Any, ...]) -> list[Any]:
        async with self._one_at_a_time, asyncio.timeout(ANSWER_S):
            if not self._sockets:
                self._sockets = [self._connect(address) for address in addresses]
            number, body = next(self._numbers).to_bytes(8, "little"), _encode(Question(method, list(args)))
            for socket in self._sockets:
                await socket.send_multipart([number, body])
            answers = [await self._answer(socket, number) for socket in self._sockets]
        self._heard = True
        for answer in answers:
            if answer.error:
                raise RuntimeError(answer.error)
        return [answer.value for answer in answers]

    def _connect(self, address: str) -> zmq.asyncio.Socket:
        socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(address)
        return socket

    async def _answer(self, socket: zmq.asyncio.Socket, number: bytes) -> Answer:
        while True:
            answered, body = await socket.recv_multipart()
            if answered == number:  # else of a question that was given up
                return _decode_answer(body)

    def close(self) -> None:
        """Nothing is asked any more."""
        for socket in self._sockets:
            socket.close()
        self._sockets = []
