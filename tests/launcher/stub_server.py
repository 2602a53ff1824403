"""Stands in for coordinator, router or instance: understands their options, answers /health, can be told to misbehave
through STUB_* environment variables. Starts a grandchild, as vLLM starts its engine core.

As the router it takes adapters (`bad` is refused, `changed` is there with other content) and answers chats: an adapter
by its name with a capital, the base model with a sentence; the first time that STUB_WRONG is asked, by another word.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def main(role: str, options: list[str]) -> int:
    print(f"{role} starts with {options}", flush=True)
    if role == os.environ.get("STUB_FAILS"):
        print(f"{role} can't find its thing", flush=True)
        return 3
    grandchild = subprocess.Popen(["sleep", "1000"])
    if os.environ.get("STUB_PIDS"):
        with open(os.environ["STUB_PIDS"], "a") as file:
            file.write(f"{os.getpid()} {grandchild.pid}\n")
    if role == "coordinator":
        time.sleep(1000)

    wrong = [os.environ.get("STUB_WRONG")]
    registered = {"changed"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            count = int(os.environ.get("STUB_INSTANCES", "2"))
            self.answer(200, json.dumps({"available": count, "instances": count}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/v1/chat/completions":
                self.chat(body)
                return
            name = body["lora_name"]
            if self.path == "/v1/unload_lora_adapter":
                registered.remove(name)
                self.answer(200, "Success")
            elif name == "bad":
                self.answer(400, json.dumps({"error": {"message": "The adapter 'bad' is broken."}}))
            elif name in registered:
                self.answer(409, json.dumps({"error": {"message": "Registered with other content; remove it first."}}))
            else:
                self.answer(200, "Success")

        def chat(self, body: dict) -> None:
            name = body["model"]
            text = "A mountain." if name == "model" else name.capitalize()
            if name == wrong[0]:
                wrong[0], text = None, "Other"
            usage = {"completion_tokens": 2, "prompt_tokens": 1, "total_tokens": 3}
            common = {"id": "x", "created": 0, "model": name}
            if not body.get("stream"):
                choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
                self.answer(
                    200,
                    json.dumps({**common, "object": "chat.completion", "choices": [choice], "usage": usage}),
                    "application/json",
                )
                return
            chunk = {**common, "object": "chat.completion.chunk"}
            choice = {"index": 0, "delta": {"content": text}, "finish_reason": "stop"}
            parts = [{**chunk, "choices": [choice]}, {**chunk, "choices": [], "usage": usage}]
            events = "".join(f"data: {json.dumps(part)}\n\n" for part in parts)
            self.answer(200, events + "data: [DONE]\n\n", "text/event-stream")

        def answer(self, status: int, text: str, kind: str = "text/plain") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args: object) -> None:
            pass

    port = int(options[options.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2:]))
