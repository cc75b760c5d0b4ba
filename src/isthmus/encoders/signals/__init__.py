"""Sensors and series → features."""
