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
    attach_experts,
    grouped_product,
    is_experts_module,
)
from reap_stream.model.transformers_api.keymap import KeyMap, checkpoint_tensors
from reap_stream.model.transformers_api.models import (
    build_meta_model,
    load_config,
    load_tokenizer,
)
from reap_stream.model.transformers_api.parameters import (
    get_tensor,
    materialize_buffers,
    parameter_dtype,
    set_tensor,
)
from reap_stream.model.transformers_api.quiet import quiet_transformers

__all__ = [
    "EXPERTS_IMPLEMENTATION",
    "ExpertsCall",
    "KeyMap",
    "apply_gate",
    "attach_experts",
    "build_meta_model",
    "checkpoint_tensors",
    "get_tensor",
    "grouped_product",
    "is_experts_module",
    "load_config",
    "load_tokenizer",
    "materialize_buffers",
    "parameter_dtype",
    "quiet_transformers",
    "set_tensor",
]
