"""Runs of language models: what differs from classification between the recipe and the report."""
