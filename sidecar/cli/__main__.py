"""`python -m sidecar.cli`, for children that have no command on their path."""

from sidecar.cli import main

main()
