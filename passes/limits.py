"""Limits that the configuration knows too, which is read before torch is imported."""

MAX_PROBE = 8192  # longest length at which a mask is evaluated: its L x L values must fit in memory
