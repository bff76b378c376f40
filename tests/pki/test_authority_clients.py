"""Real clients at their strictest, against a server on the loopback."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from pki import jks
from pki.authority import Authority, certificates_pem, create_authority
from tests.pki.clients import PYTHON, program, run, serving

ABOVE_64 = "xn--bcher-kva." + "long." * 12 + "name.example"


@dataclass(frozen=True, slots=True)
class Gate:
    port: int
    authority: Authority
    ca: Path


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    authority = create_authority(datetime.now(UTC))
    ca = tmp_path_factory.mktemp("authority") / "ca.crt"
    ca.write_bytes(certificates_pem(authority.roots[0].certificate))
    with serving(authority.issuer) as port:
        yield Gate(port, authority, ca)


HOSTS = [pytest.param(h, id=i) for h, i in (("a.example", "name"), (ABOVE_64, "no subject"), ("127.0.0.1", "address"))]


@pytest.mark.client
@pytest.mark.parametrize("host", HOSTS)
def test_curl_accepts(host: str, gate: Gate, tmp_path: Path) -> None:
    to = f"{host}:443:127.0.0.1:{gate.port}"
    outcome = run(
        [program("curl"), "-sS", "--cacert", str(gate.ca), "--connect-to", to, f"https://{host}/"], {}, tmp_path
    )
    assert outcome.trusted, outcome.said


@pytest.mark.client
@pytest.mark.parametrize("host", HOSTS)
def test_openssl_accepts_strictly(host: str, gate: Gate, tmp_path: Path) -> None:
    name = (
        ["-noservername", "-verify_ip", host]
        if host == "127.0.0.1"
        else ["-servername", host, "-verify_hostname", host]
    )
    strict = ["-CAfile", str(gate.ca), "-no-CApath", "-x509_strict", "-verify_return_error"]
    command = [program("openssl"), "s_client", "-connect", f"127.0.0.1:{gate.port}", *strict, *name]
    outcome = run(command, {}, tmp_path, trusted=lambda said: "Verify return code: 0 (ok)" in said)
    assert outcome.trusted, outcome.said


@pytest.mark.client
@pytest.mark.parametrize("host", HOSTS)
def test_python_accepts_strictly(host: str, gate: Gate, tmp_path: Path) -> None:
    script = (
        "import socket, ssl, sys\n"
        "context = ssl.create_default_context(cafile=sys.argv[1])\n"
        "context.verify_flags |= ssl.VERIFY_X509_STRICT\n"
        "with socket.create_connection(('127.0.0.1', int(sys.argv[2]))) as s:\n"
        "    with context.wrap_socket(s, server_hostname=sys.argv[3]) as t:\n"
        "        t.sendall(b'GET / HTTP/1.1\\r\\n\\r\\n'); print(t.recv(4096).decode())\n"
    )
    outcome = run([PYTHON, "-c", script, str(gate.ca), str(gate.port), host], {}, tmp_path)
    assert outcome.trusted, outcome.said


@pytest.mark.client
@pytest.mark.parametrize("host", HOSTS)
def test_node_accepts(host: str, gate: Gate, tmp_path: Path) -> None:
    script = (
        "const [ca, port, host] = process.argv.slice(1);\n"
        "const options = {host: '127.0.0.1', port, ca: require('fs').readFileSync(ca), servername: host};\n"
        "if (host == '127.0.0.1') delete options.servername;\n"
        "require('https').get({...options, headers: {host}}, r => r.pipe(process.stdout));\n"
    )
    outcome = run([program("node"), "-e", script, str(gate.ca), str(gate.port), host], {}, tmp_path)
    assert outcome.trusted, outcome.said


@pytest.mark.client
def test_java_accepts_every_kind_of_host(gate: Gate, tmp_path: Path) -> None:
    (tmp_path / "Probe.java").write_text(JAVA_PROBE)
    store = jks.truststore([gate.authority.roots[0].certificate.public_bytes(Encoding.DER)])
    (tmp_path / "trust.jks").write_bytes(store)
    program("javac")  # a source file is launched by compiling it
    hosts = [str(row.values[0]) for row in HOSTS]
    command = [program("java"), "-Djavax.net.ssl.trustStore=trust.jks", "Probe.java", str(gate.port), *hosts]
    outcome = run(command, {}, tmp_path)
    assert outcome.said.count("trusted") == len(hosts), outcome.said


JAVA_PROBE = """
import java.net.Socket; import javax.net.ssl.*;
class Probe { public static void main(String[] a) throws Exception {
  var factory = (SSLSocketFactory) SSLSocketFactory.getDefault();
  for (int i = 1; i < a.length; i++) {
    var plain = new Socket("127.0.0.1", Integer.parseInt(a[0]));
    try (var tls = (SSLSocket) factory.createSocket(plain, a[i], 443, true)) {
      var parameters = tls.getSSLParameters();
      parameters.setEndpointIdentificationAlgorithm("HTTPS");
      tls.setSSLParameters(parameters);
      tls.getOutputStream().write("GET / HTTP/1.1\\r\\n\\r\\n".getBytes());
      System.out.println(new String(tls.getInputStream().readAllBytes()));
    }
  }
}}
"""


@pytest.mark.client
@pytest.mark.parametrize("host", HOSTS)
def test_git_accepts(host: str, gate: Gate, tmp_path: Path) -> None:
    resolve = ["-c", f"http.curloptResolve={host}:{gate.port}:127.0.0.1", "-c", f"http.sslCAInfo={gate.ca}"]
    command = [program("git"), *resolve, "ls-remote", f"https://{host}:{gate.port}/"]
    outcome = run(command, {}, tmp_path, trusted=lambda said: "not found" in said)  # the 404 that follows TLS
    assert outcome.trusted, outcome.said
