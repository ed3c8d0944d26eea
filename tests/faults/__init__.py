"""Faults that real ranks survive: each is bounded, named, and seen by all."""
