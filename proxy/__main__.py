"""`python -m proxy` is `outgate`."""

from proxy.cli import main

main()
