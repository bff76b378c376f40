"""The service around the gate: the supervisor, its workers' policy, and the port an operator asks."""
