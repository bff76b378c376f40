"""musl's resolver, as in Alpine images: it gives up a name over what glibc passes over."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.proxy.dns_gate import PUBLIC, PUBLIC6
from tests.proxy.test_dns_relay_clients import IN_NAMESPACE, SEARCH, namespace_refused

LOOK_UP = r"""
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
int main(int count, char **words) {
    struct addrinfo wanted = {.ai_socktype = SOCK_STREAM}, *found;
    int error = getaddrinfo(words[1], "443", &wanted, &found);
    if (error) {
        puts(error == EAI_NONAME ? "EAI_NONAME" : error == EAI_AGAIN ? "EAI_AGAIN" : "EAI_OTHER");
        return 0;
    }
    for (; found; found = found->ai_next) {
        char text[INET6_ADDRSTRLEN];
        void *address = found->ai_family == AF_INET ? (void *)&((struct sockaddr_in *)found->ai_addr)->sin_addr
                                                    : (void *)&((struct sockaddr_in6 *)found->ai_addr)->sin6_addr;
        puts(inet_ntop(found->ai_family, address, text, sizeof text));
    }
    return 0;
}
"""


@pytest.mark.kernel
@pytest.mark.client
@pytest.mark.skipif(shutil.which("musl-gcc") is None, reason="musl-gcc is not installed")
@pytest.mark.parametrize(
    "resolv_conf",
    ["nameserver 192.0.2.53", f"nameserver 192.0.2.53\n{SEARCH}", f"nameserver 2001:db8::53\n{SEARCH}"],
    ids=["v4", "v4 with search domains", "v6 with search domains"],
)
def test_musl_resolves_allowed_names_at_once(resolv_conf: str, tmp_path: Path) -> None:
    if refused := namespace_refused():
        pytest.skip(refused)
    (tmp_path / "resolv.conf").write_text(resolv_conf + "\n")
    (tmp_path / "look_up.c").write_text(LOOK_UP)
    program = tmp_path / "look_up"
    subprocess.run(["musl-gcc", "-static", "-o", program, tmp_path / "look_up.c"], check=True, timeout=60)
    done = subprocess.run(
        [*IN_NAMESPACE, sys.executable, "-m", "tests.proxy.dns_namespace", tmp_path / "resolv.conf", program],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.stderr == ""
    seen = json.loads(done.stdout)
    found = seen["found"]
    assert found.pop("parent.example") in (
        "EAI_NONAME",
        "EAI_OTHER",
    )  # there, without addresses: EAI_NODATA since 1.2.4
    assert found.pop("rebinding.cdn.example") in ("EAI_NONAME", "EAI_OTHER")
    assert found == {
        "api.example": sorted([PUBLIC, PUBLIC6]),
        "four.cdn.example": ["93.184.216.35"],  # its AAAA is empty, not absent: musl would give it up
        "evil.example": "EAI_NONAME",
    }
    assert seen["slowest_s"] < 4  # a stub's own timeout is 5 s: nobody waited for one
    assert not any("evil" in name or "local" in name for name in seen["asked_upstream"])
