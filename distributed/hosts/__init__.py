"""What iterates the training loop and acts between its steps: this process, Ray Train workers, Ray Tune trials."""
