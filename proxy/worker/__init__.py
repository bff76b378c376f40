"""The processes that carry connections: `host` is the supervisor's side of one, `main` its own entry."""
