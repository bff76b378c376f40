"""The gate: listener, resolver, relays, the sandbox, and the command line. The top of the import arrows."""
