"""Evaluation: measures policies on tasks at exact budgets."""
