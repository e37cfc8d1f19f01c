"""Methods that were considered and are not offered; choosing one gives the reason and an alternative."""

from .base import About, Refusal, refuse_policy

refuse_policy(
    Refusal(
        "adakv",
        About("AdaKV", "2407.11550"),
        "it budgets by head, and one block table holds equally many tokens of every head; tables by head would gain "
        "nothing on the bundled model (docs/results/accuracy.md)",
        "snapkv, rkv or skipkv",
    )
)
refuse_policy(
    Refusal(
        "epicache",
        About("EpiCache", "2509.17396"),
        "it budgets by layer, and one block table holds equally many tokens of every layer; tables by layer, which are "
        "not built, would be worth 2 to 3 points on the bundled model, with snapkv most and with skipkv nothing "
        "(docs/results/accuracy.md); and it needs the application to assign requests to episodes",
        "skipkv, or snapkv and rkv with a larger budget",
    )
)
