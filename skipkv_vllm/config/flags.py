"""The command-line flags as a Markdown page: `python -m skipkv_vllm.config.flags > docs/reference/flags.md`."""

from __future__ import annotations

from .server import KVPolicyConfig, flag_names, shown_default

TEXT = """# Flags

Generated from the code by `python -m skipkv_vllm.config.flags`; a test compares.

`vllm serve --help` lists these flags in the group `KVPolicyConfig`. `vllm bench` takes them too, and
`skipkv_vllm.LLM` takes them as arguments without the dashes ([Offline](../getting-started/offline.md)). The parameters
of each method, for `--kv-policy-config`, are in [Methods](methods.md).

"""


def flags_table() -> str:
    """Return the flags as a Markdown table."""
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for name, field in KVPolicyConfig.model_fields.items():
        flag = flag_names()[name].replace("--kv-", "--[no-]kv-") if field.annotation is bool else flag_names()[name]
        rows.append(f"| `{flag}` | `{shown_default(name)}` | {field.description} |")
    return "\n".join(rows)


def document() -> str:
    """Return the page `docs/reference/flags.md`."""
    return f"{TEXT}{flags_table()}\n"


if __name__ == "__main__":
    print(document(), end="")
