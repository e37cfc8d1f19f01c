"""Measure eviction methods in the real engine; shared by the command line and the benchmarks.

`texts` reads texts, `engine` runs requests in a child process, `arms` runs methods over requests, and `store` saves
their results, so that an interrupted run can resume. `fidelity` feeds texts, `comparison` compares their log
probabilities with full KV's, and `report` and `command` are the output and the command line. `stats`, `machine` and
`figures` are used by every report.
"""


class RunError(RuntimeError):
    """The run failed; the message gives the reason and the remedy. `status` is the exit status of a command."""

    status = 1
