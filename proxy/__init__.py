"""The gate: everything that touches a socket or a process, and the command line. The top of the import arrows.

A connection passes `listener`, `connection` (peek, ask `policies.engine`, act), then `flow`, `dialer` and
`relays.stream`, or goes to the `inspector`; `runtime` puts these together. docs/architecture.md has the way and what
each package here is for.
"""
