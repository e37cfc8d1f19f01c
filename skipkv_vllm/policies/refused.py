"""Methods that were looked at and are not offered, so that who asks for one is told why and what to use instead."""

from .base import About, Refusal, refuse_policy

_UNEQUAL = (
    "one block table holds equally many tokens of every layer and head, and on the bundled model the same total, "
    "shared out unequally, gained less than the 2 points that further tables would have to be worth (docs/results.md)"
)

refuse_policy(
    Refusal("adakv", About("AdaKV", "2407.11550"), f"it budgets by head; {_UNEQUAL}", "snapkv, rkv or skipkv")
)
refuse_policy(
    Refusal(
        "epicache",
        About("EpiCache", "2509.17396"),
        f"it budgets by layer; {_UNEQUAL}; and its episodes are the application's to route",
        "snapkv, rkv or skipkv; for long prompts --no-kv-protect-prompt",
    )
)
