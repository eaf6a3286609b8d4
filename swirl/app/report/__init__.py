"""The report of runs: a page that is one file, and the same page shown live."""
