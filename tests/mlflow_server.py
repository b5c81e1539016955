"""A server on loopback that speaks as much of MLflow's API as a run needs, and can misbehave."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal


class MlflowServer(ThreadingHTTPServer):
    """What it was told; `mood` says how it answers from now on.

    Attributes:
        metrics: (key, step) → value, of all calls.
        calls: paths that were asked for.
    """

    daemon_threads = True
    block_on_close = False  # a request that hangs may hang on

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.mood: Literal["well", "hangs", "refuses"] = "well"
        self.metrics: dict[tuple[str, int], float] = {}
        self.runs: dict[str, list[dict[str, str]]] = {}  # id → tags
        self.status: str | None = None
        self.calls: list[str] = []
        self.gone = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running(server: MlflowServer) -> Iterator[MlflowServer]:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.gone.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: MlflowServer

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(length) or b"{}")
        path = self.path.partition("?")[0].rpartition("/mlflow/")[2]
        self.server.calls.append(path)
        if self.server.mood == "hangs":
            self.server.gone.wait(30)
        refused = self.server.mood == "refuses"
        answer = {"error_code": "INTERNAL_ERROR"} if refused else self.answer(path, body)
        data = json.dumps(answer).encode()
        self.send_response(503 if refused else 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        runs = self.server.runs
        if path == "experiments/get-by-name":
            return {"experiment": {"experiment_id": "1", "lifecycle_stage": "active"}}
        if path == "runs/create":
            runs[f"run-{len(runs)}"] = body["tags"]
            return {"run": self.run(f"run-{len(runs) - 1}")}
        if path == "runs/search":
            return {"runs": [self.run(known) for known in runs]}
        if path == "runs/update":
            self.server.status = body["status"]
            return {"run_info": self.run(body["run_id"])["info"]}
        if path == "metrics/get-history":
            steps = sorted(step for key, step in self.server.metrics if key == "loss")
            return {"metrics": [{"key": "loss", "value": 0, "step": s} for s in steps]}
        for metric in body.get("metrics", []) if path == "runs/log-batch" else []:
            place = (metric["key"], int(metric["step"]))
            assert place not in self.server.metrics, f"{place} came twice"
            self.server.metrics[place] = metric["value"]
        return {}

    def run(self, run_id: str) -> dict[str, Any]:
        info = {"run_id": run_id, "run_uuid": run_id, "experiment_id": "1", "status": "RUNNING"}
        tags = self.server.runs[run_id]
        return {"info": info | {"lifecycle_stage": "active"}, "data": {"tags": tags}}

    def log_message(self, *_: object) -> None:
        """Quiet."""
