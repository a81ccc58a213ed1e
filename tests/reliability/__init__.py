"""Faults and interruptions, enumerated, and what survived them."""
