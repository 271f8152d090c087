"""Reads text files of several formats as records, and records as documents.

plan.py       lists the files to read
opening.py    opens and decompresses a file; detects changes while it is read
readers.py    splits a file into records: pieces of plain text, lines of JSON, rows of Parquet
cutting.py    cuts long documents into pieces
documents.py  extracts the text of a record's document
faults.py     counts and reports what is wrong with the inputs
"""
