"""A package, so that a rank process can import the functions that a test hands it."""
