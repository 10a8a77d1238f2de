"""The command line ``ooc-influence``."""
