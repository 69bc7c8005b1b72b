"""Draft trees in stock vLLM, served as rows: every path from the newest token to a leaf is a sequence of its own.

The rows of a request share the pages of its KV cache up to the root's, and write to pages of their own that vLLM gives
the request as lookahead. Scheduler, block manager, prefix cache and attention see nothing but ordinary sequences.
"""
