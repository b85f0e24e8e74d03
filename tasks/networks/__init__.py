"""Networks by family, one a file: plain modules that know nothing of tasks."""
