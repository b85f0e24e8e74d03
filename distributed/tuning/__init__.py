"""Sweeps: searchers, schedulers and the journalled state machine that every executor drives; no Ray, no torch."""
