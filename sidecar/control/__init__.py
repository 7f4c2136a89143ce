"""The local control socket: how commands talk to a running agent, and who may ask what."""
