"""Holds: who may release a parked statement, for how long, and exactly once. Pure: no I/O, no clock."""
