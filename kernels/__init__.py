"""Operators: their definitions and fast implementations. Nothing is imported or registered here."""
