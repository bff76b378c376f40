"""Authority, leaves, and the trust bundle that workloads read."""
