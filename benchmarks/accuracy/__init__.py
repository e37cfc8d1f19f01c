"""Accuracy, generated length and KV memory of eviction policies, in the real engine: `python -m benchmarks.accuracy`.

`tasks` reads data sets, `grading` judges answers, `grid` says what is run, `run` hands it to a `pool` of `worker`
processes and keeps `samples`, `checks` refuses runs that measured nothing, `summary` turns samples into figures,
`plots`, `report` and `docs` show them.
"""

from skipkv_vllm.evaluation import RunError as RunError


class UsageError(ValueError):
    """Bad input; the message names the flag, the value, what is allowed and the remedy."""
