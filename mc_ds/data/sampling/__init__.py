"""Stateless sampling: which sequence comes next is a pure function of a seed and an index.

`windows` samples windows of a whole text, `documents` windows within single documents, `interleave`
divides samples among the parts of a mixture, and `epochs` warns about data that is read too often.
"""
