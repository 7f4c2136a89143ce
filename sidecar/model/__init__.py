"""What flows through Sidecar, as plain values. Imports nothing of ours but `errors`, and does no I/O."""
