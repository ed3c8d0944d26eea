"""Tests of the agreement: each file tests the module of the same name."""
