"""The pages of `docs/results/`: `python -m benchmarks.results` writes them from the committed JSON summaries.

`store` names the summaries and writes them, and `provenance` records and states how figures were made. Each module of
`sections` turns summaries into Markdown; `pages` registers the sections and writes the pages. `arms` and `steering`
have the tables that reports share with the pages, and `plots` the figures. This package imports no benchmark;
benchmarks import it.
"""
