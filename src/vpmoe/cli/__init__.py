"""The command line: words in, one stage called, results printed."""
