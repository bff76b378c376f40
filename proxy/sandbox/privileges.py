"""Give up every privilege for good, as root too. Mounts, routes and sockets must be ready before."""

from __future__ import annotations

from proxy.sandbox import libc, seccomp

# capabilities(7): NOROOT, NO_SETUID_FIXUP and NO_CAP_AMBIENT_RAISE set, KEEP_CAPS clear, all four locked.
# Without NOROOT uid 0 gets every capability of its user namespace back at exec, and can unmount the masks.
_SECUREBITS = 0b1110_1111


def drop() -> None:
    """After this the process and all it starts hold no capability, whatever they execute. Raises OSError."""
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    libc.prctl(libc.PR_SET_SECUREBITS, _SECUREBITS)
    with open("/proc/sys/kernel/cap_last_cap") as file:
        last = int(file.read())
    for capability in range(last + 1):
        libc.prctl(libc.PR_CAPBSET_DROP, capability)
    libc.prctl(libc.PR_CAP_AMBIENT, libc.PR_CAP_AMBIENT_CLEAR_ALL)
    libc.clear_capabilities()
    libc.set_seccomp(seccomp.program())
