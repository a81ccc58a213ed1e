"""Sweeps: many students from the same stores, and what they show together."""
