"""Evaluation: tasks and policies behind one small interface each, measured at exact budgets."""
