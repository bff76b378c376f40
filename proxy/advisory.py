"""`outgate run --proxy-env`: the command with proxy variables and no sandbox; who ignores them is not confined."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from policies.index import Policy
from proxy.options import say
from proxy.original_dst import redirected_dst
from proxy.runtime import Gate, Settings

if TYPE_CHECKING:
    from proxy.run import Renewals, Told

NOT_EXECUTABLE, NOT_FOUND = 126, 127
NOTICE = """\
--proxy-env is advisory: the command is given proxy variables and is not confined; a program that ignores them
goes where it likes. UDP, DNS and raw connections do not pass the gate at all."""


def run_advisory(
    policy: Policy,
    settings: Settings,
    command: Sequence[str],
    environment: Mapping[str, str],
    told: Told,
    renewals: Renewals,
) -> int:
    """Run `command` with variables that lead obedient programs to the gate. Returns its status as a shell would."""
    say(NOTICE)
    with told:
        return asyncio.run(_run(policy, settings, command, environment, told, renewals))


async def _run(
    policy: Policy,
    settings: Settings,
    command: Sequence[str],
    environment: Mapping[str, str],
    told: Told,
    renewals: Renewals,
) -> int:
    with socket.create_server(("127.0.0.1", 0)) as door:
        gate = Gate(policy, settings, original_dst=redirected_dst, record=told.record)
        gate.proxy(door)
        renewing = asyncio.create_task(renewals.carry_out(gate))
        try:
            child = await asyncio.create_subprocess_exec(
                *command, env=dict(environment) | proxy_variables(door.getsockname()[1], environment)
            )
        except FileNotFoundError:
            say(f"{command[0]}: command not found")
            return NOT_FOUND
        except OSError as error:
            say(f"{command[0]}: {error.strerror or error}")
            return NOT_EXECUTABLE
        else:
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGINT, lambda: None)  # the terminal tells the command itself
            for number in (signal.SIGTERM, signal.SIGHUP):
                loop.add_signal_handler(number, child.send_signal, number)
            status = await child.wait()
            return status if status >= 0 else 128 - status
        finally:
            renewing.cancel()
            await gate.close()


def proxy_variables(port: int, existing: Mapping[str, str]) -> dict[str, str]:
    """What leads curl, Python, Go, Node (24 and later) and Java to a proxy on loopback."""
    proxy = f"http://127.0.0.1:{port}"
    names = ("http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")  # HTTP_PROXY: curl reads none (CGI)
    java = " ".join(f"-D{scheme}.proxyHost=127.0.0.1 -D{scheme}.proxyPort={port}" for scheme in ("http", "https"))
    options = f"{existing.get('JAVA_TOOL_OPTIONS', '')} {java}".strip()
    return dict.fromkeys(names, proxy) | {"NODE_USE_ENV_PROXY": "1", "JAVA_TOOL_OPTIONS": options}
