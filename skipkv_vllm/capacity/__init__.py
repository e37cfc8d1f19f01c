"""What a request costs and how many fit, and what a model's configuration says about it."""

from .fit import Capacity, as_dict, blocks_with_policy, capacity, most_rows, reserved_rows
from .latents import has_latents, query_size, unread_latents
from .sizes import ModelShape, Pool
from .states import STATE_MODELS, StateSizes, has_states
from .text_config import FULL, block_size_of, groups_of, kinds_of, kv_of, others_of, shape_of, unsupported

__all__ = [
    "FULL",
    "STATE_MODELS",
    "Capacity",
    "ModelShape",
    "Pool",
    "StateSizes",
    "as_dict",
    "block_size_of",
    "blocks_with_policy",
    "capacity",
    "groups_of",
    "has_latents",
    "has_states",
    "kinds_of",
    "kv_of",
    "most_rows",
    "others_of",
    "query_size",
    "reserved_rows",
    "shape_of",
    "unread_latents",
    "unsupported",
]
