"""The cluster as the gate sees it: `pods` follows them, `reviews` verifies tokens, `main` is the process that asks for
both, `watching` the supervisor's side of it. No worker speaks to the API, and none holds a credential for it."""
