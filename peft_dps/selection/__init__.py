"""What is selected, when, from what: schedules, evidence, scores, units, budgets, exact top-k."""
