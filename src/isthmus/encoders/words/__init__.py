"""Tokens → features."""
