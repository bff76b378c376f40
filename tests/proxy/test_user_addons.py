"""The operator's own addons, over real TLS: what they may rewrite, and that none carries a request past the policy."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from policies.load import Source
from proxy.addon_files import AddonUnusable, try_addons
from proxy.config import Config, HttpHost
from proxy.inspector import Configuration
from proxy.inspector.user_addons import Budget, Held
from proxy.options import GateOptions, Unready, settings_of
from proxy.policy_files import load_sources
from proxy.run import needs_inspector
from proxy.serve import check
from tests.proxy.inspecting import HOST, POLICY, Rig, get, read_reply, response
from tests.proxy.speaking_http2 import Client, Http2Origin, origin_of

PAGE = Path(__file__).parents[2] / "docs" / "mitmproxy.md"
PUT = f"PUT /search HTTP/1.1\r\nHost: {HOST}\r\n".encode()


@dataclass
class AddonRig(Rig):
    files: tuple[Path, ...] = ()
    in_lane: bool = False

    def configuration(self) -> Configuration:
        return replace(super().configuration(), addons=tuple(map(str, self.files)))


def write(directory: Path, hook: str, *lines: str, name: str = "mine.py") -> Path:
    """A file whose one addon does this in that hook."""
    path = directory / name
    body = "\n".join(f"        {line}" for line in lines)
    path.write_text(f"class Mine:\n    def {hook}(self, flow):\n{body}\n\naddons = [Mine()]\n")
    return path


def test_the_example_of_the_page_adds_its_header_towards_the_origin(tmp_path: Path) -> None:
    [example] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    path = tmp_path / "add_header.py"
    path.write_text(example)
    try_addons([str(path)])

    with AddonRig(tmp_path, files=(path,), in_process=True) as rig:
        assert rig.send(get()).body == b"sunny"
        [record] = rig.wait_for_records(1)
        [request] = rig.origin.requests
    assert b"X-Team: weather\r\n" in request
    assert (record["verdict"], record["reason"]) == ("allow", "rule")
    assert not list(tmp_path.glob("**/*.pyc"))


def test_a_file_is_called_behind_the_one_before_it(tmp_path: Path) -> None:
    first = write(tmp_path, "requestheaders", "flow.request.headers['X-Order'] = 'a'", name="first.py")
    second = write(tmp_path, "requestheaders", "flow.request.headers['X-Order'] += 'b'", name="second.py")
    with AddonRig(tmp_path, files=(first, second)) as rig:
        assert rig.send(get()).status == 200
        assert b"X-Order: ab\r\n" in rig.origin.requests[0]


@pytest.mark.parametrize(
    ("sent", "reached"),
    [
        (PUT + b"Content-Length: 5\r\n\r\nhello", b"\r\n\r\nHELLO, HELLO"),
        (PUT + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", b"\r\n\r\nc\r\nHELLO, HELLO\r\n0\r\n\r\n"),
    ],
    ids=["length", "chunks"],
)
def test_the_body_of_a_request_may_be_another(tmp_path: Path, sent: bytes, reached: bytes) -> None:
    text = "flow.request.content.upper()"
    path = write(tmp_path, "request", f"flow.request.content = {text} + b', ' + {text}")
    with AddonRig(tmp_path, files=(path,)) as rig:
        assert rig.send(sent).status == 200
        [record] = rig.wait_for_records(1)
        [request] = rig.origin.requests
    assert request.endswith(reached)
    assert record["bytes.sent"] == 5  # what the workload sent


def test_a_response_may_be_another_in_status_fields_and_body(tmp_path: Path) -> None:
    lines = ("flow.response.status_code = 203", "flow.response.content = b'rainy!'", "del flow.response.headers['X']")
    path = write(tmp_path, "response", *lines)
    with AddonRig(tmp_path, files=(path,), respond=lambda _head, _sock: response(fields="X: y\r\n")) as rig:
        with rig.connect() as sock:
            for _ in range(2):  # the connection is as good as before
                sock.sendall(get())
                reply, _ = read_reply(sock)
                assert (reply.status, reply.body, "x" in reply.fields) == (203, b"rainy!", False)
        assert [record["http.response.status_code"] for record in rig.wait_for_records(2)] == [203, 203]
        assert rig.origin.connections == 1


CHANGES = {
    "path": "flow.request.path = '/slashes/x'",
    "denied path": "flow.request.path = '/search/secret/x'",
    "host": "flow.request.host = 'other.test'",
    "Host": "flow.request.headers['Host'] = 'other.test'",
    "port": "flow.request.port = 80",
    "scheme": "flow.request.scheme = 'http'",
    "url": "flow.request.url = 'https://other.test/'",
    "method": "flow.request.method = 'DELETE'",
    "authority": "flow.request.authority = 'other.test'",
    "version": "flow.request.http_version = 'HTTP/1.0'",
    "method override": "flow.request.headers['X-HTTP-Method-Override'] = 'DELETE'",
    "method override of CGI": "flow.request.headers['X_HTTP_Method_Override'] = 'DELETE'",
    "path override": "flow.request.headers['X-Original-URL'] = '/search/secret/x'",
    "upgrade": "flow.request.headers['Upgrade'] = 'websocket'",
    "connection": "flow.request.headers['Connection'] = 'Authorization'",
    "coding": "flow.request.headers['Transfer-Encoding'] = 'chunked'",
    "length": "flow.request.headers['Content-Length'] = '5'",
    "two lengths": "[flow.request.headers.add('Content-Length', '0') for _ in 'ab']",
    "line break in a value": "flow.request.headers['X'] = 'a\\r\\n\\r\\nGET /search/secret/x HTTP/1.1'",
    "line break in a name": "flow.request.headers['X: a\\r\\nY'] = 'b'",
    "body where there was none": "flow.request.content = b'GET /search/secret/x HTTP/1.1\\r\\n\\r\\n'",
    "body without its length": "flow.request.raw_content = b'GET /search/secret/x HTTP/1.1\\r\\n\\r\\n'",
    "trailers": "flow.request.trailers = type(flow.request.headers)([(b'x', b'y')])",
    "stream": "flow.request.stream = lambda data: data + b'GET /search/secret/x HTTP/1.1\\r\\n\\r\\n'",
    "answers itself": "from mitmproxy.http import Response; flow.response = Response.make(200, b'mine')",
    "kills it": "flow.kill()",
    "raises": "raise ValueError(flow.request.headers['Secret'])",
}


@pytest.mark.parametrize("hook", ["requestheaders", "request"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_nothing_that_was_judged_is_changed_on_its_way(tmp_path: Path, hook: str, change: str) -> None:
    with AddonRig(tmp_path, files=(write(tmp_path, hook, change),)) as rig:
        reply = rig.send(get(fields="Secret: hidden\r\n"))
        assert (reply.status, reply.reason) == (502, "addon_failed")
        [record] = rig.wait_for_records(1)
        assert (record["verdict"], record["reason"], record["rule"]) == ("deny", "addon_failed", "p.yaml:6 (weather)")
        assert record["url.full"] == f"https://{HOST}/search"
        assert "mine.py (Mine)" in str(record["error.message"])
        [failure] = rig.failures
        assert "mine.py (Mine)" in str(failure)
        assert "hidden" not in f"{failure}{record}{reply}"
        assert (rig.origin.requests, rig.origin.connections) == ([], 0)


def test_a_body_whose_length_is_said_wrong_does_not_reach_the_origin(tmp_path: Path) -> None:
    path = write(tmp_path, "request", "flow.request.raw_content += b'GET /search/secret/x HTTP/1.1'")
    with AddonRig(tmp_path, files=(path,)) as rig:
        assert rig.send(PUT + b"Content-Length: 5\r\n\r\nhello").reason == "addon_failed"
        assert rig.origin.requests == []


RESPONSES = {
    "switches protocols": "flow.response.status_code = 101",
    "is continued": "flow.response.status_code = 100",
    "ends elsewhere": "flow.response.headers['Content-Length'] = '1'",
    "two codings": "flow.response.headers['Transfer-Encoding'] = 'chunked'",
    "line break in its first line": "flow.response.reason = 'OK\\r\\nX: y'",
    "is taken away": "flow.response = None",
    "line break": "flow.response.headers['X'] = 'a\\r\\n\\r\\n'",
    "raises": "raise ValueError('hidden')",
    "another request": "flow.request.path = '/search/secret/x'",
}


@pytest.mark.parametrize("hook", ["responseheaders", "response"])
@pytest.mark.parametrize("change", RESPONSES.values(), ids=RESPONSES)
def test_a_response_that_an_addon_spoils_is_a_502(tmp_path: Path, hook: str, change: str) -> None:
    with AddonRig(tmp_path, files=(write(tmp_path, hook, change),)) as rig:
        reply = rig.send(get())
        assert (reply.status, reply.reason) == (502, "addon_failed")
        [record] = rig.wait_for_records(1)
        assert (record["verdict"], record["reason"]) == ("deny", "addon_failed")
        assert [str(one).split(")")[0] for one in rig.failures] == ["addon mine.py (Mine"]


def test_others_go_on_where_an_addon_raises_for_one(tmp_path: Path) -> None:
    path = write(tmp_path, "requestheaders", "1 / ('bad' not in flow.request.path)")
    with AddonRig(tmp_path, files=(path,), in_process=True) as rig, rig.connect() as kept:
        kept.sendall(get())
        assert read_reply(kept)[0].status == 200
        assert rig.send(get("/search/bad")).status == 502
        kept.sendall(get())
        assert read_reply(kept)[0].status == 200
        rig.wait_for(lambda: rig.log)
        assert [record["reason"] for record in rig.wait_for_records(3)] == ["rule", "addon_failed", "rule"]
    assert "addon mine.py (Mine) raised ZeroDivisionError in requestheaders, line 3" in rig.log[0]


def test_an_addon_that_clears_what_the_gate_noted_is_recorded_all_the_same(tmp_path: Path) -> None:
    with AddonRig(tmp_path, files=(write(tmp_path, "request", "flow.metadata.clear()"),)) as rig:
        assert rig.send(get()).status == 200
        assert [record["reason"] for record in rig.wait_for_records(1)] == ["rule"]


def test_an_addon_does_not_see_what_is_denied(tmp_path: Path) -> None:
    hooks = ("requestheaders", "request", "responseheaders", "response")
    files = tuple(write(tmp_path, hook, "raise ValueError", name=f"{hook}.py") for hook in hooks)
    with AddonRig(tmp_path, files=files) as rig:
        assert rig.send(get("/forecasts")).reason == "no_allow_entry"
        assert rig.failures == []


def test_a_policy_that_is_replaced_meanwhile_judges_the_next_request(tmp_path: Path) -> None:
    path = write(tmp_path, "requestheaders", "flow.request.headers['X-Mine'] = 'yes'")
    with AddonRig(tmp_path, files=(path,)) as rig, rig.connect() as sock:
        sock.sendall(get())
        assert read_reply(sock)[0].status == 200
        policy = load_sources([Source("p.yaml", POLICY.replace("/search/**", "/elsewhere"))])
        rig.loop.call_soon_threadsafe(rig.bench.swap, policy)
        sock.sendall(get("/search/new"))
        assert read_reply(sock)[0].reason == "no_allow_entry"
        sock.sendall(get("/elsewhere"))
        assert read_reply(sock)[0].status == 200
        assert [b"X-Mine: yes\r\n" in request for request in rig.origin.requests] == [True, True]


def test_streams_of_http2_are_called_for_each_by_itself(tmp_path: Path) -> None:
    lines = (
        "if b'bad' in flow.request.content: flow.request.path = '/slashes/x'",
        "flow.request.content += b', mine'",
    )
    files = (
        write(tmp_path, "request", *lines, name="first.py"),
        write(tmp_path, "response", "flow.response.content += b' again'", name="second.py"),
    )
    with AddonRig(tmp_path, make_origin=Http2Origin, files=files) as gate, Client(gate) as client:
        streams = [client.send(method="POST", body=body) for body in (b"good", b"bad", b"better")]
        answers = [client.wait(stream) for stream in streams]
        assert [answer.reason for answer in answers] == [None, "addon_failed", None]
        assert (answers[0].body, answers[2].body) == (b"sunny again", b"sunny again")
        assert sorted(heard.body for heard in origin_of(gate).heard) == [b"better, mine", b"good, mine"]
        assert client.get("/forecasts").reason == "no_allow_entry"
        assert client.send(method="POST", body=b"more")  # the connection goes on


@pytest.mark.parametrize("change", ["authority", "path", "method", "kills it", "raises", "line break in a value"])
@pytest.mark.parametrize("hook", ["requestheaders", "request"])
def test_nothing_that_was_judged_is_changed_over_http2_either(tmp_path: Path, hook: str, change: str) -> None:
    files = (write(tmp_path, hook, CHANGES[change]),)
    with AddonRig(tmp_path, make_origin=Http2Origin, files=files) as gate, Client(gate) as client:
        assert [client.get(f"/search/{n}").reason for n in range(2)] == ["addon_failed"] * 2
        assert [record["reason"] for record in gate.wait_for_records(2)] == ["addon_failed"] * 2
        assert origin_of(gate).heard == []


@pytest.mark.parametrize("hook", ["request", "response"])
def test_a_body_too_long_to_be_held_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str) -> None:
    monkeypatch.setattr("proxy.inspector.user_addons.MAX_HELD", 100_000)
    path = write(tmp_path, hook, "flow.comment = 'seen'")
    put = PUT + b"Content-Length: 200000\r\n\r\n" + bytes(200_000)
    large = response(bytes(200_000))
    with AddonRig(tmp_path, files=(path,), respond=lambda _head, _sock: large) as rig:
        assert rig.send(put if hook == "request" else get()).reason == "addon_failed"
        assert [record["reason"] for record in rig.wait_for_records(1)] == ["addon_failed"]


def test_what_is_held_is_given_back(tmp_path: Path) -> None:
    path = write(tmp_path, "request", "flow.comment = 'seen'")
    bounds = replace(AddonRig(tmp_path).bounds, waiting=300_000)  # of 200,000 one fits
    put = PUT + b"Content-Length: 200000\r\n\r\n" + bytes(200_000)
    with AddonRig(tmp_path, files=(path,), bounds=bounds) as rig:
        with rig.connect() as gone:
            gone.sendall(put[:150_000])
        assert [record["reason"] for record in rig.wait_for_records(1)] == ["client_gone"]
        rig.wait_for(lambda: rig.core.is_idle)
        assert [rig.send(put).status for _ in range(4)] == [200] * 4


def test_more_than_all_may_hold_is_refused() -> None:
    budget = Budget(100)
    first, second = Held(budget), Held(budget)
    assert first.grow(60) == ""
    assert "too many bodies" in second.grow(60)
    second.release()
    first.release()
    assert budget.held == 0


BAD = {
    "absent": (None, "No such file"),
    "syntax": ("x = (\n", "mine.py:1: "),
    "import": ("\nimport nothing_of_this_name\naddons = [1]\n", "mine.py:2: does not load: ModuleNotFoundError"),
    "a module beside it": ("import beside\naddons = [1]\n", "mine.py:1: does not load: ModuleNotFoundError"),
    "raises": ("raise ValueError('why')\n", "mine.py:1: does not load: ValueError: why"),
    "exits": ("raise SystemExit(0)\n", "mine.py:1: does not load: SystemExit"),
    "no addons": ("class Mine: ...\n", "mine.py: has no addons; end it with addons = [YourAddon()]"),
    "empty": ("addons = []\n", "mine.py: has no addons"),
    "class": ("class Mine: ...\naddons = [Mine]\n", "Mine in addons is a class; say Mine()"),
    "no hook": ("class Mine: ...\naddons = [Mine()]\n", "mine.py (Mine) has no hook"),
    "other hook": ("class Mine:\n def tcp_message(self, flow): ...\naddons = [Mine()]\n", "does not call tcp_message"),
    "async": ("class Mine:\n async def request(self, flow): ...\naddons = [Mine()]\n", "request is async"),
    "ends the process": ("import os\nos._exit(0)\n", "the process that loaded it ended"),
}


@pytest.mark.parametrize(("text", "says"), BAD.values(), ids=BAD)
def test_a_file_that_cannot_be_used_is_one_clear_line(tmp_path: Path, text: str | None, says: str) -> None:
    (tmp_path / "beside.py").write_text("")
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(AddonUnusable) as caught:
        try_addons([str(path)])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_service_does_not_start_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text("pass\n")
    (tmp_path / "p.yaml").write_text("version: 1\nworkloads: {}\n")
    assert check(Config(policy=(str(tmp_path / "p.yaml"),), addons=(str(tmp_path / "mine.py"),))) == 3
    assert "mine.py: has no addons" in capsys.readouterr().err


def options(*addons: str) -> GateOptions:
    return GateOptions(
        paths=(), tags=(), workload="app", hosts=(), upstream_ca=None, pki=None, log=None, addons=addons
    )  # fmt: skip


def test_with_an_addon_everything_inspected_is_mitmproxys(tmp_path: Path) -> None:
    settings = settings_of(options(str(write(tmp_path, "request", "pass"))), lambda: "")
    policy = "version: 1\nworkloads: {app: {rules: [{host: a.test, tls: inspect}]}}\n"
    assert settings.http_host is HttpHost.MITMPROXY
    assert needs_inspector(load_sources([Source("p.yaml", policy)]), settings)


def test_a_run_does_not_start_with_a_bad_one_either(tmp_path: Path) -> None:
    with pytest.raises(Unready, match=r"absent\.py: No such file"):
        settings_of(options(str(tmp_path / "absent.py")), lambda: "")
