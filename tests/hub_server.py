"""A stand-in for the Hugging Face Hub on loopback: as much of its API as it takes to make and fill a model repository.

It asks for all files as parts of the commit, as the Hub does for small ones. Those are all that a test has.
"""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from huggingface_hub.utils.sha import git_hash

from tests.loopback import JsonHandler, JsonServer, serving


@dataclass
class Repository:
    """What was made and sent."""

    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=list)
    """Files by name, oldest commit first."""

    @property
    def files(self) -> dict[str, bytes]:
        return {name: content for commit in self.commits for name, content in commit.items()}


class HubServer(JsonServer):
    """`fault` is the status of every answer, when there is one; while `commits` is not set, none is taken."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.fault: int | None = None
        self.commits = threading.Event()
        self.commits.set()


@contextmanager
def serve() -> Iterator[HubServer]:
    """A Hub for the time of a `with` block."""
    server = HubServer()
    with serving(server):
        yield server


class _Handler(JsonHandler):
    server: HubServer

    def do_POST(self) -> None:
        body = self.body()
        hub = self.server
        hub.requests.append(f"{self.command} {self.path}")
        if hub.fault is not None:
            return self.answer(hub.fault, {"error": "fault"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            url = {"url": f"{hub.url}/{name}"}
            if name in hub.repositories:
                return self.answer(409, url | {"error": "You already created this model repo"})
            hub.repositories[name] = Repository(private=asked["visibility"] == "private")
            return self.answer(200, url)
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        named = re.fullmatch(r"/api/models/([\w-]+/[\w.-]+)(?:/(preupload|commit|revision)/main)?", self.path)
        if named is None or named[1] not in hub.repositories:
            return self.answer(404, {"error": "Repository not found"})
        repository = hub.repositories[named[1]]
        if named[2] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            hashes = {name: git_hash(content) for name, content in repository.files.items()}
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self.answer(200, {"files": [mode | {"oid": hashes.get(mode["path"])} for mode in modes]})
        if named[2] == "commit":
            hub.commits.wait()
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            repository.commits.append({file["path"]: base64.b64decode(file["content"]) for file in files})
        oid = f"{len(repository.commits):040x}"
        facts = {"id": named[1], "sha": oid, "private": repository.private, "siblings": []}
        self.answer(200, facts | {"commitUrl": f"{hub.url}/{named[1]}/commit/{oid}", "commitOid": oid})

    do_GET = do_POST
