"""The command-line flags of the server's configuration, as text.

`python -m skipkv_vllm.config.flags` prints their table.
"""

from __future__ import annotations

from .server import KVPolicyConfig, flag_names


def flags_table() -> str:
    """The flags as a Markdown table, for the README."""
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for name, field in KVPolicyConfig.model_fields.items():
        flag = flag_names()[name].replace("--kv-", "--[no-]kv-") if field.annotation is bool else flag_names()[name]
        default = field.get_default(call_default_factory=True)
        shown = {"None": "off", "True": "on", "False": "off", "[]": "none", "{}": "none"}.get(str(default), default)
        rows.append(f"| `{flag}` | `{shown}` | {field.description} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(flags_table())
