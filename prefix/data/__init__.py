"""Files of sentences become tokens on disk: tables.py opens, rows.py picks, splits.py divides, corpus.py encodes."""
