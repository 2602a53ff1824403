"""Stands in for coordinator, router or instance: understands their options, answers /health, can be told to misbehave
through STUB_* environment variables. Starts a grandchild, as vLLM starts its engine core.
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

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            count = int(os.environ.get("STUB_INSTANCES", "2"))
            self.answer(200, json.dumps({"available": count, "instances": count}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if body["lora_name"] == "bad":
                self.answer(400, json.dumps({"error": {"message": "The adapter 'bad' is broken."}}))
            else:
                self.answer(200, "Success")

        def answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args: object) -> None:
            pass

    port = int(options[options.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2:]))
