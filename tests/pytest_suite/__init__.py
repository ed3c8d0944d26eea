"""A suite of small tests that `tests.test_pytest_plugin` runs on one process, and on several ranks."""
