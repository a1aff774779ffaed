"""What result files say: scores, costs, checks, figures, pages."""
