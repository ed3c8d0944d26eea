"""Suites of ten shapes, each before and after it uses this library; README.md has the table."""
