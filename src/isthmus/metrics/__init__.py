"""Measures that torchmetrics does not have."""
