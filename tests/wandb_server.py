"""A stand-in for the W&B server on loopback: as much of its API as runs, their resumption and upload, and views need.

It keeps what it is sent as W&B does: a file of rows is written at the offset that the client names, and what stood
there is gone, so a client that does not ask how far the run got replaces the run's earlier rows.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.loopback import JsonHandler, JsonServer, serving

KEY = "0123456789planted0123456789planted012345"


@dataclass
class ServedRun:
    """What the server knows of one run."""

    fields: dict[str, Any] = field(default_factory=dict)
    """Variables of the latest UpsertBucket: displayName, groupName, config as JSON …"""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)
    """Lines of wandb-history.jsonl (rows), wandb-events.jsonl (system metrics) …"""
    uploads: list[str] = field(default_factory=list)
    """Names of whole files: wandb-metadata.json, config.yaml …"""
    exit_code: int | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.files.get("wandb-history.jsonl", [])]


class WandbServer(JsonServer):
    """`fault` decides over all requests: None answers, a number is the status of every answer, `hang` never answers.

    `stream_fault` does so over uploads of rows alone. `dies` is (rows, fault): when it has so many rows of a run it
    fails like that, in the middle of a request, of which it keeps the rows that fit.
    """

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.runs: dict[str, ServedRun] = {}
        self.views: dict[str, dict[str, Any]] = {}
        """Variables of the latest UpsertView2, by name: entityName, displayName, spec as JSON …"""
        self.requests: list[str] = []
        self.fault: int | str | None = None
        self.stream_fault: int | None = None
        self.dies: tuple[int, int | str] | None = None
        self.closing = threading.Event()

    def graphql(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        if operation == "RunResumeStatus":
            run = self.runs.get(variables["name"])
            return {"model": {"id": "m", "name": "p", "entity": _ENTITY, "bucket": run and _bucket(run)}}
        if operation == "UpsertBucket":
            run = self.runs.setdefault(variables["name"], ServedRun())
            run.fields |= {name: value for name, value in variables.items() if value is not None}
            run.config |= json.loads(variables["config"] or "{}")
            run.summary |= json.loads(variables["summaryMetrics"] or "{}")
            return {"upsertBucket": {"bucket": _bucket(run), "inserted": not run.files}}
        if operation == "CreateRunFiles":
            self.runs[variables["run"]].uploads += variables["files"]
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if operation == "Viewer":
            return {"viewer": {"id": "u", "username": "someone", "entity": _ENTITY["name"], "flags": "{}"}}
        if operation == "View":
            projects = {run.fields["project"] for run in self.runs.values()}
            found = [{"node": {"id": name}} for name in self.views if name == variables["view"]]
            project = {"entity": _ENTITY, "allViews": {"edges": found}}
            return {"model": project if variables["project"] in projects else None}
        if operation == "UpsertView2":
            self.views[variables["name"]] = variables
            return {"upsertView": {"view": {"id": variables["name"], "name": variables["name"]}, "inserted": True}}
        return {}

    def stream(self, run_id: str, body: dict[str, Any]) -> None:
        run = self.runs[run_id]
        files = body.get("files", {})
        rows = files.get("wandb-history.jsonl")
        if self.dies and rows and rows["offset"] + len(rows["content"]) >= self.dies[0]:
            room, self.fault = self.dies
            body = {}
            files = {"wandb-history.jsonl": {**rows, "content": rows["content"][: room - rows["offset"]]}}
        for name, chunk in files.items():
            if name == "wandb-summary.json":
                run.summary = json.loads(chunk["content"][-1])
            else:
                run.files.setdefault(name, [])[chunk["offset"] :] = chunk["content"]
        if body.get("complete"):
            run.exit_code = body["exitcode"]


@contextmanager
def serve() -> Iterator[WandbServer]:
    """A server for the time of a `with` block."""
    server = WandbServer()
    with serving(server):
        try:
            yield server
        finally:
            server.closing.set()


_ENTITY = {"id": "e", "name": "someone"}


def _bucket(run: ServedRun) -> dict[str, Any]:
    history, events = run.files.get("wandb-history.jsonl", []), run.files.get("wandb-events.jsonl", [])
    return {
        "id": "b",
        "name": run.fields["name"],
        "displayName": run.fields.get("displayName"),
        "project": {"id": "p", "name": run.fields["project"], "entity": _ENTITY},
        "config": json.dumps(run.config),
        "wandbConfig": json.dumps({"t": 1}),
        "summaryMetrics": json.dumps(run.summary),
        "historyLineCount": len(history),
        "historyTail": json.dumps(history[-1:]),
        "eventsLineCount": len(events),
        "eventsTail": json.dumps(events[-1:]),
        "logLineCount": 0,
        "tags": [],
    }


class _Handler(JsonHandler):
    server: WandbServer

    def do_POST(self) -> None:
        body = self.body()
        self.server.requests.append(f"{self.command} {self.path}")
        is_stream = self.path.endswith("/file_stream")
        if is_stream and self.server.stream_fault is not None:
            return self.answer(self.server.stream_fault, {"error": "fault"})
        if is_stream and self.server.fault is None:
            self.server.stream(self.path.split("/")[-2], json.loads(body))
        fault = self.server.fault
        if fault == "hang":
            self.server.closing.wait()
        if fault is not None:
            return self.answer(fault if isinstance(fault, int) else 503, {"errors": [{"message": "fault"}]})
        if self.path == "/graphql":
            query = json.loads(body)
            operation = re.findall(r"\w+", query["query"])[1]  # its `operationName` may be empty
            return self.answer(200, {"data": self.server.graphql(operation, query.get("variables") or {})})
        self.answer(200, {})

    do_GET = do_PUT = do_POST
