"""Accuracy, generated length and KV memory of eviction policies, in the real engine: `python -m benchmarks.accuracy`.

`tasks` reads data sets, `grading` judges answers, and `grid` defines a run. `run` hands its requests to a `pool` of
`worker` processes and keeps the `samples`; `checks` refuses runs that measured nothing. `summary` turns samples into
figures, and `report` shows them. `options` are those of `run`; `bundled` and `steering` measure the bundled model.
"""

from skipkv_vllm import KVPolicyError
from skipkv_vllm.evaluation import RunError as RunError


class UsageError(KVPolicyError):
    """Bad input; the message names the flag, the value, what is allowed and the remedy."""
