"""Text of any kind as records and documents.

plan.py       inputs to a list of files: the one rule for what is read
opening.py    compressed or not, to bytes; a file that changes meanwhile is a fault
readers.py    bytes to records: pieces of plain text, lines of JSON, rows of Parquet
cutting.py    where long documents are cut into pieces
documents.py  a record to the text of its document, or a fault
faults.py     what is wrong with an input, counted and named
"""
