"""What lmkit takes from the libraries below beside their public interface: all of it, in one place.

Versions move weekly. A test tries each entry on the oldest and the newest supported version, another finds what the
source uses and does not list here, and the first load logs a warning about what is gone.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from lmkit.errors import VersionError

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger("lmkit")

OLDEST: Final[Mapping[str, str]] = {"transformers": "5.23.0", "torch": "2.13.0", "accelerate": "1.2.0"}
"""The oldest versions that lmkit runs on, found by running them. transformers before 5.23 casts weights to the dtype of
the module that will hold them before they are quantized, so that all of int8 and int4 are zeros; before 5.20 its chat
templates let control tokens in messages pass. torch 2.11 cannot compile steps for any number of rows, and before
that it does not say what a CPU can do; 2.12 was not tried."""

TESTED: Final[Mapping[str, str]] = {"transformers": "5.24.0", "torch": "2.14.1", "accelerate": "1.15.0"}
"""The newest versions that lmkit was tested with."""


@dataclass(frozen=True, slots=True)
class Borrowed:
    """Something that a library does not promise to keep.

    Attributes:
        path: Where it is: a module, a colon, and names within it.
        room: Which module of lmkit uses it.
        without: What lmkit does where it is gone.
    """

    path: str
    room: str
    without: str

    @property
    def there(self) -> bool:
        """Whether it can be found."""
        module, _, names = self.path.partition(":")
        try:
            functools.reduce(getattr, names.split("."), importlib.import_module(module))
        except (ImportError, AttributeError, RuntimeError):
            return False
        return True


_MODEL, _WRITER = "transformers:PreTrainedModel", "transformers:GenerationMixin"
_QUANTIZER = "transformers.quantizers.base:HfQuantizer"
_FAILS = "models cannot be loaded"
_NO_ROWS = "rows fail, with the reason"
_NOT_COMPILED = "compile=True fails, with the reason"
_NOT_FOUND = "the Hub cannot be asked"
_NOT_OWN = "no int8 and int4 on a CPU"
_NOT_QUANTIZED = "quantized models cannot be planned"
_PLAIN = "torch's own layers, as the plan says"
_SLOW = "generate() prepares each step, with a warning"
_WIDE = "products with weights that are widened for each"

BORROWED: Final = tuple(
    Borrowed(*entry)
    for entry in (
        ("transformers.cache_utils:DynamicLayer", "engine.cache, engine.compiled, planning.running", _FAILS),
        ("transformers.cache_utils:DynamicSlidingWindowLayer", "engine.cache, planning.running", _FAILS),
        (f"{_WRITER}._supports_default_dynamic_cache", "planning.running", _SLOW),
        (f"{_WRITER}._prepare_special_tokens", "engine.choice", _NO_ROWS),
        (f"{_WRITER}._get_logits_processor", "engine.choice", _NO_ROWS),
        (f"{_WRITER}._update_model_kwargs_for_generation", "engine.decoders.fallback", _NO_ROWS),
        (f"{_MODEL}._can_set_attn_implementation", "kernels.attention, planning.skeleton", _FAILS),
        (
            "transformers:PreTrainedConfig._attn_implementation",
            "kernels.attention, planning.running, planning.skeleton, engine.graph",
            _FAILS,
        ),
        ("transformers:PreTrainedConfig._experts_implementation", "planning.keyvalues", _FAILS),
        ("transformers.masking_utils:sdpa_mask", "kernels.attention", _FAILS),
        ("transformers.integrations.sdpa_attention:sdpa_attention_forward", "kernels.attention", _NO_ROWS),
        (f"{_MODEL}._get_dtype_plan", "planning.skeleton, kernels.quantizer", _FAILS),
        (f"{_MODEL}._keep_in_fp32_modules", "kernels.quantizer", _NOT_OWN),
        (f"{_MODEL}._no_split_modules", "planning.skeleton", _FAILS),
        ("transformers.integrations.accelerate:_get_device_map", "planning.skeleton", "no division among devices"),
        ("transformers.modeling_utils:load_state_dict", "checkpoint.files", _FAILS),
        ("transformers.conversion_mapping:get_model_conversion_mapping", "planning.weight_names", _FAILS),
        ("transformers.core_model_loading:rename_source_key", "planning.weight_names", _FAILS),
        ("transformers.core_model_loading:WeightConverter", "planning.weight_names", _FAILS),
        ("transformers.core_model_loading:WeightRenaming", "planning.weight_names", _FAILS),
        ("transformers.quantizers.auto:AutoHfQuantizer", "planning.skeleton", _NOT_QUANTIZED),
        (f"{_QUANTIZER}.preprocess_model", "planning.skeleton", _NOT_QUANTIZED),
        (f"{_QUANTIZER}.param_needs_quantization", "planning.skeleton, kernels.quantizer", _NOT_QUANTIZED),
        (f"{_QUANTIZER}.param_element_size", "planning.skeleton", _NOT_QUANTIZED),
        ("transformers.quantizers.base:get_keys_to_not_convert", "planning.skeleton", _NOT_QUANTIZED),
        ("transformers.quantizers.auto:AUTO_QUANTIZER_MAPPING", "kernels.quantizer", _NOT_OWN),
        ("transformers.core_model_loading:ConversionOps", "kernels.quantizer", _NOT_OWN),
        ("transformers.pytorch_utils:Conv1D", "planning.skeleton, kernels.quantizer", _FAILS),
        ("transformers.modeling_rope_utils:ROPE_INIT_FUNCTIONS", "checkpoint.config", "positions get another error"),
        ("transformers:AutoModelForCausalLM._model_mapping._model_mapping", "checkpoint.tasks", _FAILS),
        ("transformers.modeling_gguf_pytorch_utils:tqdm", "checkpoint.gguf", "GGUF files cannot be loaded"),
        ("transformers.utils.chat_template_utils:_compile_jinja_template", "text.sandbox", "no chats"),
        ("transformers.utils.chat_template_utils:render_jinja_template", "text.sandbox", "no chats"),
        (
            "transformers.utils.chat_parsing.response_templates:load_response_template",
            "replies.formats",
            "response templates are not read",
        ),
        (
            "transformers.utils.chat_parsing.content_parsers:process_field",
            "replies.formats",
            "calls of response templates cannot be read",
        ),
        ("jinja2.utils:_PassArg.from_obj", "text.sandbox", "no chats"),
        ("transformers.utils.logging:is_progress_bar_enabled", "_quiet", _FAILS),
        ("transformers.utils.logging:set_tqdm_hook", "wrappers.progress", _FAILS),
        ("huggingface_hub.utils._headers:build_hf_headers", "checkpoint.find", _NOT_FOUND),
        ("huggingface_hub.utils._http:get_session", "checkpoint.find", _NOT_FOUND),
        ("huggingface_hub.utils._http:hf_raise_for_status", "checkpoint.find", _NOT_FOUND),
        ("peft.tuners.tuners_utils:BaseTunerLayer.set_adapter", "planning.adapters", "no several adapters at once"),
        ("peft.utils:ModulesToSaveWrapper.set_adapter", "planning.adapters", "no several adapters at once"),
        ("bitsandbytes.functional:QuantState", "planning.skeleton", "what 4 bits hold is measured too low"),
        ("accelerate.hooks:add_hook_to_module", "kernels.packed", "modules that are moved about might be packed"),
        ("torch:ops.mkldnn._reorder_linear_weight", "kernels.packed", _PLAIN),
        ("torch:ops.mkldnn._linear_pointwise", "kernels.packed, engine.graph", _PLAIN),
        ("torch:ops.mkldnn._is_mkldnn_bf16_supported", "kernels.packed", _PLAIN),
        ("torch:cpu._init_amx", "kernels.native.build", "AMX is not used"),
        ("torch:ops.aten._weight_int8pack_mm", "kernels.quantized, kernels.cuda", _WIDE),
        ("torch:ops.aten._weight_int4pack_mm", "kernels.cuda", _NO_ROWS),
        ("torch:ops.aten._convert_weight_to_int4pack", "kernels.cuda", _FAILS),
        ("torch:ops.aten._weight_int4pack_mm_for_cpu", "kernels.quantized", _WIDE),
        ("torch:ops.aten._convert_weight_to_int4pack_for_cpu", "kernels.quantized", _WIDE),
        ("torch.overrides:_get_current_function_mode_stack", "loading.turns", _FAILS),
        ("torch.overrides:TorchFunctionMode", "planning.skeleton", _FAILS),
        ("torch.overrides:_pop_mode", "loading.turns", _FAILS),
        ("torch.overrides:_push_mode", "loading.turns", _FAILS),
        ("torch:Tensor._version", "kernels.together", _NO_ROWS),
        ("torch._subclasses:FakeTensor", "kernels.quantized, kernels.together, kernels.tied", _FAILS),
        ("torch._subclasses:FakeTensorMode", "engine.graph", _NOT_COMPILED),
        ("torch._inductor:standalone_compile", "engine.graph", _NOT_COMPILED),
        ("torch._inductor:config.patch", "engine.graph", _NOT_COMPILED),
        ("torch._inductor.standalone_compile:CompiledArtifact", "engine.graph", _NOT_COMPILED),
        ("torch._inductor.runtime.cache_dir_utils:temporary_cache_dir", "engine.graph", _NOT_COMPILED),
        ("torch._inductor.async_compile:AsyncCompile.pool.cache_clear", "engine.graph", _NOT_COMPILED),
        ("torch.fx.experimental.proxy_tensor:make_fx", "engine.graph", _NOT_COMPILED),
        ("torch.fx.experimental.symbolic_shapes:DimDynamic", "engine.graph", _NOT_COMPILED),
        ("torch.fx.experimental.symbolic_shapes:ShapeEnv", "engine.graph", _NOT_COMPILED),
        ("torch.fx.experimental.symbolic_shapes:StatelessSymbolicContext", "engine.graph", _NOT_COMPILED),
    )
)


@functools.cache
def check_versions() -> None:
    """Refuse libraries that are older than lmkit can run on; asked at the first use.

    Raises:
        VersionError: One is too old; the message says which, and what to install.
    """
    from packaging.version import Version

    for library, oldest in OLDEST.items():
        if Version(found := version(library)) < Version(oldest):
            raise VersionError(
                f"{library} {found} is too old, lmkit needs {oldest} or later: pip install --upgrade "
                f"'{library}>={oldest}'."
            )


@functools.cache
def warn_of_gone() -> None:
    """Say once what lmkit borrows and no longer finds, of modules that are imported by now."""
    for one in BORROWED:
        module = one.path.partition(":")[0]
        if module in sys.modules and not one.there:
            library = module.partition(".")[0]
            told = library, version(library), one.path, TESTED.get(library, "another"), one.without
            logger.warning("%s %s has no %s any more, which lmkit takes from it (tested with %s): %s.", *told)


def cache_name(model: Any) -> str | None:
    """Return what `forward` calls its cache: "cache" since transformers 5.24; None where it takes none."""
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in accepted), None)


def cache_of(outputs: Any) -> Any:
    """Return the cache in what `forward` gave, by whatever name; None where there is none."""
    names = ("cache", "past_key_values", "cache_params")
    return next((found for name in names if (found := outputs.get(name)) is not None), None)
