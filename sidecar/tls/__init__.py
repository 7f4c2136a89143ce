"""TLS of our own: the local authority and its leaves, the trust stores of this host, the variables of runtimes that have stores of
their own. Opens no connection of a flow: that is `proxy`."""
