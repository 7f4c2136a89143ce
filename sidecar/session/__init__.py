"""Sans-io sessions: one per flow, events in, commands out. See `sidecar.session.commands`."""
