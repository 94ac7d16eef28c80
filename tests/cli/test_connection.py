"""The connection of the command to a controller that is away for some time, or sends what a terminal must not get."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from harness.processes import call_main

from orchard.cli import connection
from orchard.cli.connection import AnswerError, ControllerConnection
from orchard.cli.context import Context
from orchard.cli.main import main
from orchard.cli.streams import changes

Answer = tuple[int, Any]

INFO = (200, {"capabilities": ["wait-for", "events-follow", "watch-list"]})
GONE = (503, {"message": "no healthy backend"})
# The connection ends without an answer.
CUT: Answer = (0, {})


class ScriptedController(ThreadingHTTPServer):
    """Answers requests for a path one after the other from a list; the last answer again and again."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.answers: dict[str, list[Answer]] = {"/v1/controller/info": [INFO]}
        self.targets: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answering(BaseHTTPRequestHandler):
    server: ScriptedController

    def do_PATCH(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.do_GET()

    do_POST = do_PUT = do_DELETE = do_PATCH  # noqa: N815

    def do_GET(self) -> None:
        self.server.targets.append(self.path)
        answers = self.server.answers.get(self.path.partition("?")[0]) or self.server.answers["any"]
        status, body = answers.pop(0) if len(answers) > 1 else answers[0]
        if not status:
            return
        self.send_response(status)
        if status == 503 and isinstance(body, dict):
            self.send_header("Retry-After", "1")
        self.end_headers()
        lines = body if isinstance(body, list) else [body]
        self.wfile.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedController]:
    monkeypatch.setattr(connection, "_RETRY_SECONDS", 0.0)
    with ScriptedController() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("ORCHARD_URL", server.url)
        yield server
        server.shutdown()
        thread.join()


def test_stream_is_opened_over_each_kind_of_outage(controller: ScriptedController, tmp_path: Path) -> None:
    first, second = ({"payload": word, "cursor": word} for word in ("one", "two"))
    controller.answers["/v1/vms/vm/events"] = [GONE, CUT, (200, [first]), (200, [second])]
    for answers, expected in (([], "one\n"), ([CUT, GONE], "two\n")):
        controller.answers["/v1/vms/vm/events"][:0] = answers
        assert call_main(main, "logs", "vm", "vm", "-f", home=tmp_path) == (0, expected, "")


def test_outage_is_borne_for_a_bounded_time(controller: ScriptedController, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_OUTAGE_SECONDS", 0.0)
    controller.answers["/v1/watch"] = [GONE]
    with ControllerConnection(Context(controller.url)) as client, pytest.raises(AnswerError):
        next(changes(client, []))


def test_watch_says_where_all_begins_anew(controller: ScriptedController) -> None:
    added, bookmark = {"type": "ADDED", "object": {}}, {"type": "BOOKMARK", "revision": "7"}
    controller.answers["/v1/watch"] = [
        (200, [added]),
        (200, [added, bookmark]),
        GONE,
        (200, [{"type": "MODIFIED", "revision": "8"}]),
        (410, {"message": "gone"}),
        (200, [bookmark]),
    ]
    with ControllerConnection(Context(controller.url)) as client:
        watched = changes(client, [])
        seen = [next(watched) for _ in range(7)]
    kinds = [change and change["type"] for change in seen]
    assert kinds == ["ADDED", None, "ADDED", "BOOKMARK", "MODIFIED", None, "BOOKMARK"]
    assert [target.partition("since=")[2] for target in controller.targets] == ["", "", "7", "7", "8", ""]


def test_waiting_for_a_vm_goes_on_over_an_outage(controller: ScriptedController, tmp_path: Path) -> None:
    html: Answer = (503, "<html>")
    controller.answers["/v1/vms/vm"] = [(200, {"uid": "u"}), GONE, CUT, html, (502, {"message": "bad"}), (200, {})]
    assert call_main(main, "wait", "vm", "vm", home=tmp_path) == (0, "", "")


def test_message_of_a_controller_cannot_move_the_cursor(controller: ScriptedController, tmp_path: Path) -> None:
    controller.answers["/v1/vms"] = [(400, {"message": "\x1b[2Jgone\x9b1A"})]
    status, out, err = call_main(main, "list", "vms", home=tmp_path)
    assert (status, out) == (1, "")
    assert err.removesuffix("\n").isprintable()


@pytest.mark.parametrize("kind", ["bootstrap-token", "vm-access-token", "vm"])
def test_missing_name_is_a_usage_error(kind: str, controller: ScriptedController, tmp_path: Path) -> None:
    assert call_main(main, "get", kind, home=tmp_path)[0] == 2
    assert controller.targets == []


def test_token_of_a_rotation_without_an_answer_is_printed(controller: ScriptedController, tmp_path: Path) -> None:
    """The controller may have taken the token, which the command has made."""
    controller.answers["any"] = [CUT]
    status, out, _ = call_main(main, "rotate", "token", "ci", home=tmp_path)
    assert (status, len(out.strip())) == (1, 32)


VERBS = """status; describe vm x; describe worker x; list vms; list vms -q; list workers; list service-accounts; get vm x
get vm x/cpu; get worker x; get service-account x; get cluster-settings; get bootstrap-token x; get vm-access-token x
delete vm --filter metadata.a=b; apply -f FILE; set cluster-settings --prepull a/b; pause worker x; resume worker x
logs vm x; logs vm x --tail 3; logs vm x -f; events vm x; wait vm x --timeout 1; ip vm x; drain worker x --wait --timeout 1
capacity; history; sessions; accept-state; watch; create vm x --wait --timeout 1; create service-account x; create token vm x
exec vm x -- ls; cp x:/tmp/a FILE.got; cp FILE x:/tmp/a
ssh vm x ls; ssh-config; update vm x --priority 1; rotate token x; restart vm x; stop vm x; suspend vm x; start vm x; top
login FILE; delete vm x; delete worker x; delete service-account x; doctor"""


@pytest.mark.parametrize("value", [5, [5], {}])
def test_answer_of_another_form_is_no_traceback(value: object, controller: ScriptedController, tmp_path: Path) -> None:
    """Another program answers at the URL, with JSON."""
    (tmp_path / "vm.json").write_text('{"name": "x"}')
    known = ["wait-for", "events-follow", "watch-list", "vm-metadata", "drain", "capacity", "history", "sessions"]
    controller.answers |= {"/v1/controller/info": [(200, {"capabilities": known})], "any": [(200, [value])]}
    for line in VERBS.replace("\n", "; ").split("; "):
        words = line.replace("FILE", str(tmp_path / "vm.json")).split()
        status, _, err = call_main(main, *words, home=tmp_path)
        assert status != 2, line
        assert len(err.splitlines()) <= 1, line
