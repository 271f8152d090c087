"""What report.py and summarize_run.py are made of: what a run says (runs, evaluations, focus,
glossary), what that means (statistics, verdict, comparison, charts), and how it is shown (figures,
pictures, document).
"""
