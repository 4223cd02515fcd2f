"""Reads what a plan says, and carries out the rest of it on the model that was read."""

from __future__ import annotations

import copy
import functools
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lmkit._borrowed import warn_of_gone
from lmkit.checkpoint.config import chat_template
from lmkit.checkpoint.files import Source, reading, reading_weights
from lmkit.checkpoint.tasks import auto_class
from lmkit.errors import listed
from lmkit.kernels import attention, norms, ordered, rotary, tied
from lmkit.kernels.native.build import NoKernelsError, instructions
from lmkit.kernels.native.operators import operators, refusal
from lmkit.kernels.packed import pack
from lmkit.kernels.quantized import runs_torch_kernels
from lmkit.kernels.together import join
from lmkit.loading.turns import without_pool
from lmkit.planning.adapters import bringing, templated
from lmkit.planning.layout import embedded_rows
from lmkit.planning.running import unexpected
from lmkit.planning.weight_names import check_report
from lmkit.wrappers.progress import loading

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from lmkit.planning.plan import LoadPlan
    from lmkit.planning.trial import Wish

logger = logging.getLogger("lmkit")


def read_tokenizer(source: Source, wish: Wish) -> Any:
    """Read the tokenizer: the adapter's, or with its chat template, where it brings one."""
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    brought, template = bringing(wish.adapters), templated(wish.adapters)
    name, folder = (source.name, source.folder) if brought is None else (brought.origin, brought.folder)
    gguf = {"gguf_file": source.gguf_file} if source.gguf_file and brought is None else {}
    trusted = wish.access.trust_remote_code
    with reading(f"the tokenizer of {name!r}"):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True, **gguf)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"{type(tokenizer).__name__} is no tokenizer of one vocabulary")
        if not isinstance(tokenizer.model_max_length, (int, float)):
            raise TypeError(f"model_max_length is {tokenizer.model_max_length!r}, not a number")
        try:
            tokenizer.all_special_ids  # noqa: B018 - transformers looks for what is no token as for the unknown one
        except RecursionError as error:
            raise ValueError(f"its unk_token {tokenizer.unk_token!r} is not in its vocabulary") from error
        if template is not None:
            tokenizer.chat_template = chat_template(template.folder)
    if brought is not None and not tokenizer.chat_template:
        tokenizer.chat_template = read_tokenizer(source, replace(wish, adapters=())).chat_template
    return tokenizer


def read_model(plan: LoadPlan, config: PreTrainedConfig, source: Source, wish: Wish) -> Any:
    """Read the weights as planned, or leave nothing behind."""
    placed, quantization = plan.placement, plan.precision.quantization
    arguments: dict[str, Any] = {
        "config": config,
        "dtype": plan.precision.dtype,
        "device_map": dict(plan.device_map),
        "trust_remote_code": wish.access.trust_remote_code,
        "local_files_only": True,
        "adapter_kwargs": {"subfolder": "none"},  # transformers would put one on that lies beside the weights
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # so that the report names them, and is refused below
    }
    if placed.offload_folder is not None:
        arguments["offload_folder"] = placed.offload_folder
    if quantization is not None:
        arguments["quantization_config"] = copy.deepcopy(quantization)
    if source.gguf_file is not None:
        arguments["gguf_file"] = source.gguf_file
    if wish.attn_implementation is not None:
        arguments["attn_implementation"] = wish.attn_implementation
    read = functools.partial(auto_class(plan.task, config).from_pretrained, source.folder, **arguments)
    with reading_weights(source):
        model, report = loading(lambda: without_pool(read) if placed.device_type == "cpu" else read())
    check_report(report, plan.name, plan.model_class)
    if source.gguf_file is not None and plan.end_token_ids:
        model.generation_config.eos_token_id = list(plan.end_token_ids)
    return model


def with_kernels(plan: LoadPlan, model: Any, wish: Wish) -> tuple[LoadPlan, Any]:
    """Put lmkit's own kernels into a model, as planned; return the plan, which says where that failed, and them."""
    here = plan.placement.device_type == "cpu"
    attends = here and wish.compile and plan.attention == attention.NAME and refusal() is None
    if plan.kernels != "native" and not attends:
        return plan, None
    try:
        isa = instructions()
        kernels = operators(isa)
    except NoKernelsError as error:
        why = f"torch's, although lmkit's own were asked for: {error}"
        logger.warning("%s: kernels: %s", plan.name, why)
        told = {"kernels": why} | ({"attention": f"without a kernel of lmkit's own: {error}"} if attends else {})
        kept: Any = {"native": "packed" if _is_wide(model) else "torch"}.get(plan.kernels, plan.kernels)
        return replace(plan, kernels=kept, reasons={**plan.reasons, **told}), None
    if plan.kernels == "native" and not _is_wide(model):
        ordered.put_on(model, isa)
        tied.put_on_head(model, isa)
    return plan, kernels


def _is_wide(model: Any) -> bool:
    """Say whether a model's linear layers are not what lmkit quantized; GGUF files have a quantizer of their own."""
    return not any(isinstance(module, ordered.Ordered) for module in model.modules())


def as_compiled(plan: LoadPlan, model: Any) -> LoadPlan:
    """Say in the plan how far a model is compiled whose quantized layers torch's kernels multiply."""
    if not (plan.compiled and runs_torch_kernels(model)):
        return plan
    why, masked = "since torch's kernels multiply what is quantized", plan.task == "masked"
    told = f"not compiled, {why}" if masked else f"{plan.reasons['compiled']}; for one row at a time, {why}"
    return replace(plan, compiled=not masked, reasons={**plan.reasons, "compiled": told})


def carry_out(plan: LoadPlan, model: Any, kernels: Any) -> None:
    """Replace of a model that was read what the plan says."""
    if plan.kernels == "packed" or (plan.kernels == "native" and _is_wide(model)):
        isa = instructions() if plan.kernels == "native" else None
        pack(model, plan._together, isa)  # noqa: SLF001 - names that are for this alone
    else:
        join(model, plan._together)  # noqa: SLF001
    if plan.attention == attention.NAME:
        attention.put_on(model, kernels)
    if kernels is not None:
        norms.put_on(model, kernels)
    rotary.put_on(model)


def _warn_of_tokens(model: Any, tokenizer: Any, name: str) -> None:
    """Log that a tokenizer has tokens which the model has no embeddings for: texts with one of them fail."""
    rows = embedded_rows(model)
    if rows is not None and len(tokenizer) > rows:
        beyond = [tokenizer.convert_ids_to_tokens(token_id) for token_id in range(rows, min(len(tokenizer), rows + 5))]
        more = " and others" if len(tokenizer) > rows + len(beyond) else ""
        logger.warning("%s: tokens without an embedding, %d are there: %s%s", name, rows, listed(beyond), more)


def tell(plan: LoadPlan, model: Any, tokenizer: Any) -> None:
    """Log each reason; as warnings that a part is offloaded, that rows run slower than known, and what is gone."""
    for what, reason in plan.reasons.items():
        logger.log(logging.WARNING if what == "offload" else logging.INFO, "%s: %s: %s", plan.name, what, reason)
    if (told := unexpected(plan.task, plan.engine, model.config.model_type)) is not None:
        logger.warning("%s: %s: %s", plan.name, plan.reasons["engine"], told)
    warn_of_gone()
    _warn_of_tokens(model, tokenizer, plan.name)
