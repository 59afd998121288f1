"""How good a prefix is: scores, k-shot prompting beside it, where its attention goes, and the pages that show it."""
