"""The verbs of `pha`: functions that call the library and print; `pha.cli` reads their signatures.

What takes long to import is imported where a verb runs, so that `pha --help` is quick.
"""
