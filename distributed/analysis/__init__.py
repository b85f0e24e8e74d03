"""After training: evaluate, predict, and later error analysis and reports."""
