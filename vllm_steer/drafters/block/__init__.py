"""Block drafters: k tokens in one pass, each blind to the others, and what repairs that blindness."""
