"""Tests that need GPUs."""
