"""Records on disk: encoding, chain, signatures, spool, shipping, verification. The formats are in docs/audit.md."""
