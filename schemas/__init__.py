"""Shared contracts: recipe, plan, row layouts and store records. Imports no machine-learning library."""
