"""What gather_text.py is made of: packages that hold text, and pages as documents."""
