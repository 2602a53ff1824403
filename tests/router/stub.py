"""A stand-in for a vLLM server: does what its script says, step by step, and stops at gates instead of sleeping.

Steps: `json` (a complete answer that names the stub), `status:N` (an error answer), `hold` (wait until `release`),
`headers` (begin an event stream), `event` (send the next event), `error:N` (an error event, as vLLM sends it),
`comment` (a keep-alive), `flood:N` (N events of 64 KiB), `half` (send half an event), `done` (end the stream),
`die` (reset the connection). Run as a program it prints its port, then `arrived` for every request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence

from aiohttp import web
from multidict import CIMultiDict

EVENT = 'data: {{"choices": [{{"text": "{name}-{n}"}}]}}\n\n'


class Stub:
    """One server; `script` may be changed between requests, each request runs the one it finds."""

    def __init__(self, name: str, script: Sequence[str] = ("json",)) -> None:
        self.name = name
        self.script = list(script)
        self.base = "base"
        self.models = ["base"]
        self.key = ""
        """What /v1/models asks for."""
        self.paths: list[str] = []
        self.bodies: list[bytes] = []
        self.headers: list[CIMultiDict[str]] = []
        self.arrived = asyncio.Semaphore(0)
        self.left = asyncio.Semaphore(0)
        """One for every request whose client went away."""
        self.running = 0
        self.port = 0
        self.loud = False
        self._gate = asyncio.Event()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def release(self) -> None:
        """Lets every request go on that is at a gate, or comes to one later."""
        self._gate.set()

    def hold(self) -> None:
        """Closes the gate again."""
        self._gate.clear()

    async def start(self, port: int = 0) -> Stub:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.0, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _models(self, request: web.Request) -> web.Response:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        cards: list[dict[str, object]] = [{"id": name, "parent": self.base, "root": name} for name in self.models]
        for card in cards:
            if card["id"] == self.base:
                card |= {"parent": None, "max_model_len": 2048}
        return web.json_response({"object": "list", "data": cards})

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.paths.append(request.raw_path)
        self.bodies.append(await request.read())
        self.headers.append(CIMultiDict(request.headers))
        self.running += 1
        self.arrived.release()
        if self.loud:
            print("arrived", flush=True)
        try:
            return await self._run(request, list(self.script))
        except (asyncio.CancelledError, ConnectionError):
            self.left.release()
            raise
        finally:
            self.running -= 1

    def _error(self, status: int) -> dict[str, object]:
        return {"error": {"message": f"stub {self.name}", "type": "Stub", "param": None, "code": status}}

    async def _run(self, request: web.Request, script: list[str]) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        sent = 0
        for step in script:
            verb, _, argument = step.partition(":")
            if verb == "hold":
                await self._gate.wait()
            elif verb == "json":
                return web.json_response({"served_by": self.name})
            elif verb == "status":
                return web.json_response(self._error(int(argument)), status=int(argument))
            elif verb == "headers":
                await stream.prepare(request)
            elif verb == "event":
                await stream.write(EVENT.format(name=self.name, n=sent).encode())
                sent += 1
            elif verb == "error":
                await stream.write(f"data: {json.dumps(self._error(int(argument)))}\n\n".encode())
            elif verb == "comment":
                await stream.write(b": keep-alive\n\n")
            elif verb == "flood":
                for _ in range(int(argument)):
                    await stream.write(b"data: " + b"x" * ((64 << 10) - 8) + b"\n\n")
            elif verb == "half":
                await stream.write(EVENT.format(name=self.name, n=sent).encode()[:20])
            elif verb == "die":
                assert request.transport is not None
                request.transport.abort()
                raise ConnectionResetError("as the script says")
            elif verb == "done":
                await stream.write(b"data: [DONE]\n\n")
            else:
                raise ValueError(f"no step {step!r}")
        await stream.write_eof()
        return stream


async def _main(arguments: argparse.Namespace) -> None:
    stub = Stub(arguments.name, arguments.script)
    stub.loud = True
    await stub.start()
    print(json.dumps({"port": stub.port}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", default="stub")
    parser.add_argument("script", nargs="*", default=["json"])
    asyncio.run(_main(parser.parse_args()))
