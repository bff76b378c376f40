"""The main job at work: a stand-in weather origin with real TLS, curl under the weather policy, one table."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import trustme
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
OUTGATE = Path(sys.prefix) / "bin" / "outgate"  # of the environment that runs this
POLICY = ROOT / "policies" / "examples" / "weather.yaml"
WEATHER, UBUNTU = "dataservice.accuweather.com", "archive.ubuntu.com"

# what is tried, the curl that tries it, and what must come of it
TRIES = [
    ("GET /search, which the policy allows", [f"https://{WEATHER}/search?q=Oslo"], "200"),
    ("GET /forecasts on the same host", [f"https://{WEATHER}/forecasts/v1/daily"], "403"),
    (
        "the same, spelled /search/%2e%2e/forecasts",
        ["--path-as-is", f"https://{WEATHER}/search/%2e%2e/forecasts"],
        "400",
    ),
    ("POST /search", ["-d", "x=1", f"https://{WEATHER}/search"], "403"),
    ("a host that the policy does not name", ["https://paste.example/"], "no such name"),
    ("*.ubuntu.com, carried undecrypted", [f"https://{UBUNTU}/"], "200"),
    ("the right SNI with another Host", ["-H", "Host: paste.example", f"https://{WEATHER}/search"], "421"),
    ("an address instead of a name", ["-k", "https://203.0.113.7/"], "refused"),
]


class Origin(http.server.BaseHTTPRequestHandler):
    """Answers everything, so that whatever is refused below is refused by the gate."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = json.dumps({"origin": self.headers.get("Host"), "path": self.path}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


def start_origin(directory: Path) -> int:
    """A TLS server on loopback under both names; its root is written to `origin.pem`. Returns its port."""
    authority = trustme.CA(organization_name="The Origin's Own Authority")
    authority.cert_pem.write_to_path(str(directory / "origin.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(WEATHER, UBUNTU).configure_cert(context)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Origin)
    server.daemon_threads = True
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return int(server.server_address[1])


def curl_all() -> None:
    """Runs inside the sandbox: every curl of TRIES, results as JSON on standard output."""
    results = []
    for _, arguments, _ in TRIES:
        done = subprocess.run(
            [
                "curl",
                "--silent",
                "--show-error",
                "--verbose",
                "--max-time",
                "20",
                "--write-out",
                "\n%{http_code}",
                *arguments,
            ],
            capture_output=True,
            text=True,
        )
        body, _, status = done.stdout.rpartition("\n")
        issuer = next((line.split("issuer:")[1].strip() for line in done.stderr.splitlines() if "issuer:" in line), "")
        error = next((line for line in done.stderr.splitlines() if line.startswith("curl: ")), "")
        results.append({"status": status, "body": body, "issuer": issuer, "exit": done.returncode, "error": error})
    json.dump(results, sys.stdout)


def run_gate(directory: Path, port: int, *, advisory: bool) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    return subprocess.run(
        [str(OUTGATE), "run", *(["--proxy-env"] if advisory else []),
         "--policy", str(POLICY.relative_to(ROOT)), "--workload", "weather",
         "--host", f"{WEATHER}=127.0.0.1:{port}", "--host", f"{UBUNTU}=127.0.0.1:{port}",
         "--upstream-ca", str(directory / "origin.pem"),
         "--", sys.executable, str(Path(__file__).resolve()), "--inside"],
        capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120,
    )  # fmt: skip


def outcome(result: dict[str, str | int]) -> str:
    """What a person would call it: the status, or how the connection was refused."""
    if result["status"] != "000":
        return str(result["status"])
    return {5: "no such name", 6: "no such name"}.get(int(result["exit"]), "refused")


def meaning(result: dict[str, str | int]) -> str:
    body = str(result["body"]).strip()
    if result["status"] in ("403", "400", "421"):
        problem = json.loads(body)
        return f"{problem['reason']}: {problem['detail']}"
    if result["status"] == "200":
        return f"the certificate curl saw was issued by {result['issuer']}"
    return str(result["error"]).removeprefix("curl: ")


def main() -> int:
    if "--inside" in sys.argv:
        curl_all()
        return 0
    if not shutil.which("curl"):
        print("the demo drives curl, which is not installed", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 132)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="outgate-demo-") as name:
        port = start_origin(Path(name))
        done = run_gate(Path(name), port, advisory=False)
        if done.returncode == 125:
            print(done.stderr, file=sys.stderr)
            print(
                "Namespaces are refused here; showing the same with proxy variables, which a program may ignore.\n",
                file=sys.stderr,
            )
            done = run_gate(Path(name), port, advisory=True)
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
        return done.returncode
    results = json.loads(done.stdout)
    table = Table(
        box=SIMPLE_HEAD, title=f"curl under {POLICY.relative_to(ROOT)}, through outgate run", title_justify="left"
    )
    table.add_column("tried", ratio=3)
    table.add_column("outcome", no_wrap=True)
    table.add_column("seen by curl", ratio=6)
    as_expected = True
    for (tried, _, expected), result in zip(TRIES, results, strict=True):
        got = outcome(result)
        as_expected &= got == expected or (expected == "no such name" and got in ("refused", "403"))
        table.add_row(tried, Text(got, style="green" if got == "200" else "red"), Text(meaning(result)))
    console.print(table)
    print("What a program was refused is said when it ends, with the lines to paste:\n")
    print("    " + "\n    ".join(done.stderr.strip().splitlines()))
    print(f"\n{time.monotonic() - started:.1f} s. Now your own command:\n")
    own = f"run -p {POLICY.relative_to(ROOT)} -w weather -- curl -v https://{WEATHER}/search"
    print(f"    {os.path.relpath(OUTGATE, ROOT)} {own}\n")
    if not as_expected:
        print("something above is not what the policy says", file=sys.stderr)
    return 0 if as_expected else 1


if __name__ == "__main__":
    sys.exit(main())
