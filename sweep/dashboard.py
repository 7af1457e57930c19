"""optuna-dashboard on the ledger of a sweep: it shows what a driver writes meanwhile, and changes nothing.

Its own command writes what is done in the browser (notes, trials that are told, studies that are deleted) into the
journal, beside the driver and without checksums. Here it reads the ledger itself, for a copy would stand still; reading
a journal takes no lock.
"""

from collections.abc import Iterable
from importlib.util import find_spec
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna

from sweep.status import Status
from sweep.study import follow_journal

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

HOST = "127.0.0.1"


class NotInstalled(Exception):
    """optuna-dashboard is missing; the message says how to get it."""


def server(found: Status, ledger: str | None, port: int) -> WSGIServer:
    """A server of this machine alone, which `serve_forever` starts; port 0 takes one that is free.

    `ledger` is the URL of the database, where the recorded spec does not have its password. Raises `NotInstalled`, and
    OSError when the port is taken.
    """
    if find_spec("optuna_dashboard") is None:
        raise NotInstalled("optuna-dashboard is not installed; get it with: python -m pip install optuna-dashboard")
    from optuna_dashboard import wsgi

    url = ledger or found.spec.ledger
    storage = optuna.storages.get_storage(url) if url else follow_journal(found.place.paths.ledger)
    return make_server(HOST, port, _reading(wsgi(storage)), server_class=_Threads, handler_class=_Silent)


def _reading(dashboard: "WSGIApplication") -> "WSGIApplication":
    """An application of which nothing is left that writes."""

    def answer(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return dashboard(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "application/json")])
        return [b'{"reason": "The ledger of a sweep is only shown here"}']  # the page says it

    return answer


class _Threads(ThreadingMixIn, WSGIServer):
    """Browsers hold connections open on which they ask nothing."""

    daemon_threads = True


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of each request."""
