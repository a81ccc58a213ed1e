"""The command line, and what joins ``precompute`` and ``distill`` on real machines."""
