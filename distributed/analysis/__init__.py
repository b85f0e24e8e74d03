"""What can be said of runs, tasks, stores and machines without training a run: figures, predictions, checks."""
