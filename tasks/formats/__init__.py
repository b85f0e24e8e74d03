"""Readers of raw formats: each turns files into plain Python values or numpy arrays, and says what is broken where."""
