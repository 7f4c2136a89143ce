"""The kernel's side of steering: hooks (bcc), rules (pyroute2), maps, namespaces. Only `agent.py` and the command line use it."""
