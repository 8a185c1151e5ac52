"""Every use of transformers' less public modules, in one place.

What the rest of the package needs of transformers is: a model class for a config, that model
without weights, the renaming of checkpoint keys to its parameters, and the one call through
which its routed experts run. When a release of transformers moves one of these, this folder is
where it is mended.
"""

from __future__ import annotations

from reap_stream.model.transformers_api.experts_call import (
    EXPERTS_IMPLEMENTATION,
    ExpertsCall,
    apply_gate,
    attach_to_call,
    grouped_product,
    is_transformers_class,
    uses_experts_call,
)
from reap_stream.model.transformers_api.keymap import KeyMap, checkpoint_tensors
from reap_stream.model.transformers_api.models import (
    build_meta_model,
    load_config,
    load_tokenizer,
)
from reap_stream.model.transformers_api.mtp import (
    LAYERS_PATH,
    block_name,
    build_mtp_model,
    mtp_key_map,
    mtp_kinds,
    mtp_layer_arguments,
    shared_mtp_names,
)
from reap_stream.model.transformers_api.outputs import BaseOutput
from reap_stream.model.transformers_api.parameters import (
    get_tensor,
    materialize_buffers,
    parameter_dtype,
    set_tensor,
    tied_names,
)
from reap_stream.model.transformers_api.quiet import quiet_transformers

__all__ = [
    "EXPERTS_IMPLEMENTATION",
    "LAYERS_PATH",
    "BaseOutput",
    "ExpertsCall",
    "KeyMap",
    "apply_gate",
    "attach_to_call",
    "block_name",
    "build_meta_model",
    "build_mtp_model",
    "checkpoint_tensors",
    "get_tensor",
    "grouped_product",
    "is_transformers_class",
    "load_config",
    "load_tokenizer",
    "materialize_buffers",
    "mtp_key_map",
    "mtp_kinds",
    "mtp_layer_arguments",
    "parameter_dtype",
    "quiet_transformers",
    "set_tensor",
    "shared_mtp_names",
    "tied_names",
    "uses_experts_call",
]
