"""What methods are compared on: tasks, their data, and metrics."""
