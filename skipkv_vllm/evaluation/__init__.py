"""Measure eviction methods in the real engine: what the command line and the benchmarks share.

`texts` reads texts, `engine` runs requests in a child process, `arms` runs methods over requests and `store`
keeps their results, so that a stopped run resumes. `fidelity` feeds texts, `comparison` turns log probabilities into
differences to full KV, `report` and `command` are their output and command line. `stats`, `machine` and `figures`
serve every report.
"""


class RunError(RuntimeError):
    """The run failed; the message says why and what to do. `status` is the exit status of a command."""

    status = 1
