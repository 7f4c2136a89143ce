"""Who a job is: tokens found in its own context, verified against issuers that the configuration names."""
