"""What carries bytes between a workload and its upstream once a verdict admits them."""
