"""One file per kernel: how an operator becomes commands.

Letters: M tokens, N output features, K summed features, C features per slice, R query rows.
"""
