"""Recipes that ship with tmkd, as package data."""
