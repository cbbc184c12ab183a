"""Easi3R."""
