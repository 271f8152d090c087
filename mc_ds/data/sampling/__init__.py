"""Which sequence comes next, without a history: every choice is a pure function of a seed and an
index.

`windows` orders the windows of one text, `documents` those that stay within a document,
`interleave` shares samples out among the parts of a mixture, `epochs` says how often texts are
read.
"""
