"""What a sweep may vary: plain data that names dotted settings, one YAML file a task; no Ray, no torch."""
