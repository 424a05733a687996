"""Our place in `from_pretrained`: a registered quantizer that narrows the empty model, decodes, and then goes away.

With `names`, the only code that relies on what transformers does not document. `UNDOCUMENTED` lists the methods; where
something imported by name is gone, importing fails with the message of `registration`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_prune.checkpoint.encodings import ENCODINGS, decode
from hf_prune.checkpoint.files import check_files
from hf_prune.checkpoint.format import QUANT_METHOD, CheckpointTable, Packed, parse, to_dict
from hf_prune.checkpoint.names import disk_names, module_names, table_on_disk, tensor_names
from hf_prune.graph.resize import owners, pick, resize
from hf_prune.graph.table import check_buffers, made_buffers, owner_and_leaf, require_known, tensors_of
from hf_prune.types import ShapeTable

CHECKED_WITH = "5.23.0"
"""Newest transformers that the tests ran with."""

UNDOCUMENTED = {
    HfQuantizer: (
        "_process_model_before_weight_loading",
        "_process_model_after_weight_loading",
        "get_weight_conversions",
        "remove_quantization_config",
    ),
    WeightConverter: ("convert", "rename_source_key"),
}
"""Class -> names that loading overrides or calls."""


def register() -> None:
    """Make `from_pretrained` understand `quant_method: hf_prune`; a second call changes nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(HfPruneConfig)
        register_quantizer(QUANT_METHOD)(HfPruneQuantizer)


def require_undocumented() -> None:
    """Raise `ImportError` where the installed transformers lacks a name that loading relies on."""
    needed = [(owner, name) for owner, names in UNDOCUMENTED.items() for name in names]
    gone = [f"{owner.__name__}.{name}" for owner, name in needed if not hasattr(owner, name)]
    if gone:
        raise ImportError(
            f"hf_prune loads checkpoints through {', '.join(gone)}, which transformers {transformers.__version__} "
            f"lacks. hf_prune needs transformers >= 5.10 and was last checked with {CHECKED_WITH}: install that, or a "
            f"newer hf_prune."
        )


def auto_classes(config_class: type) -> dict[str, str]:
    """Auto class -> model class, by name, for every Auto class that knows `config_class`."""
    from transformers.models.auto import modeling_auto  # half a second that loading does not need

    autos = {name: auto for name, auto in vars(modeling_auto).items() if name.startswith("AutoModel")}
    mappings = {name: getattr(auto, "_model_mapping", {}) for name, auto in autos.items()}
    return {name: mapping[config_class].__name__ for name, mapping in mappings.items() if config_class in mapping}


class HfPruneConfig(QuantizationConfigMixin):
    """`quantization_config` of a checkpoint while it loads; the loaded model keeps a plain dict."""

    quant_method: Any = QUANT_METHOD

    def __init__(self, **raw: Any) -> None:
        self.table = parse(raw)

    def to_dict(self) -> dict[str, Any]:
        """The table as config.json holds it."""
        return to_dict(self.table)


class HfPruneQuantizer(HfQuantizer):
    """Replays the shape table before the weights load, and leaves an ordinary model after."""

    is_trainable = True
    narrow = ShapeTable()
    packed: Mapping[str, Packed] = {}

    def is_serializable(self) -> bool:
        """True: what was loaded saves like any other model."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a transformers that loads in another way, before it builds the model."""
        require_undocumented()

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> None:
        config: Any = self.quantization_config
        table: CheckpointTable = config.table
        stored = [*table.narrow.shapes, *table.encodings]
        names, moved = tensor_names(stored, model)
        buffers = table.narrow.buffers
        modules = module_names([*table.narrow.attributes, *(owner_and_leaf(name)[0] for name in buffers)], model)
        if not moved and type(model).__name__ in (model.config.architectures or ()):
            # Another class rightly lacks the head of the one saved; the same class must know every name.
            require_known(stored, names.keys() | tensors_of(model).keys(), "tensor")
            require_known(table.narrow.attributes, modules.keys() | dict(model.named_modules()).keys(), "module")
            require_known(buffers, made_buffers(model), "buffer")
        self.narrow = ShapeTable(
            _renamed(table.narrow.shapes, names),
            _renamed(table.narrow.attributes, modules),
            {
                f"{modules[owner]}.{leaf}": entries
                for (owner, leaf), entries in ((owner_and_leaf(name), each) for name, each in buffers.items())
                if owner in modules
            },
        )
        self.packed = _renamed(table.encodings, names)
        check_buffers(model, self.narrow.buffers)
        resize(model, replace(self.narrow, buffers={}))  # code fills these after the weights, at full size
        self.dtypes = {name: tensor.dtype for name, tensor in tensors_of(model).items()}
        if checkpoint_files is not None:
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
            found = check_files(table, shapes | {k: shapes[local] for k, local in names.items()}, checkpoint_files)
            _mark_initialised(model, self.narrow, set(tensor_names(found, model)[0].values()))

    def get_weight_conversions(self) -> list[WeightConverter]:
        """One converter per last part of a packed tensor's name; transformers matches and collects by that part."""
        # Side tensors first: some versions of transformers take the first pattern that matches, not the longest.
        suffixes = [*(f"_{suffix}" for encoding in ENCODINGS.values() for suffix in encoding.sides), ""]
        leaves = sorted({name.rpartition(".")[2] for name in self.packed})
        return [Unpack([leaf + suffix for suffix in suffixes], [leaf], [Decode(self.packed)]) for leaf in leaves]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # From here on this is a plain narrow model: Trainer, `.half()` and `save_pretrained` must see no quantizer.
        self.remove_quantization_config(model)
        pick(model, self.narrow.buffers)
        _cast_renamed(model, self.dtypes)
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [conversion for conversion in conversions if not isinstance(conversion, Unpack)]
        if self.narrow:
            table = CheckpointTable(table_on_disk(self.narrow, disk_names(model)))
            model.config.quantization_config = to_dict(table)
        return model


def _mark_initialised(model: Any, narrow: ShapeTable, stored: Collection[str]) -> None:
    """Have transformers not initialise narrow modules all of whose tensors are `stored`.

    It would keep no value of that, but some models cannot compute the values for every size.
    """
    for path in owners(narrow.shapes):
        module, prefix = model.get_submodule(path), f"{path}." if path else ""
        own = tensors_of(module).keys()
        if {prefix + name for name in own} <= set(stored) and dict(module.named_buffers()).keys() <= own:
            module._is_hf_initialized = True


def _cast_renamed(model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give tensors the dtype that was asked for: transformers 5.10 keeps the stored one where the name changed."""
    floats = {name: tensor for name, tensor in tensors_of(model).items() if tensor.is_floating_point()}
    wanted = {name: tensor for name, tensor in floats.items() if tensor.dtype != dtypes[name]}
    if wanted and not model._get_dtype_plan(model.dtype):  # a plan keeps some tensors in float32 on purpose
        for name, tensor in wanted.items():
            tensor.data = tensor.data.to(dtypes[name])


def _renamed(table: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names[name]: value for name, value in table.items() if name in names}


class Unpack(WeightConverter):
    """Collects the parts of packed tensors."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Unpack:
        # transformers copies the converter for each tensor it meets, which took longer than decoding: nothing but the
        # collected tensors is a copy's own.
        return type(self)([*self.source_patterns], [*self.target_patterns], self.operations)


class Decode(ConversionOps):
    """Values and side tensors -> the tensor. Tensors stored plain, whose names end alike, pass through."""

    def __init__(self, packed: Mapping[str, Packed]) -> None:
        self.packed = packed

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """`input_dict` has a list of one tensor under each last part of a name that was found."""
        name = kwargs["full_layer_name"]
        packed = self.packed.get(name)
        if packed is None:
            return input_dict
        leaf = name.rpartition(".")[2]
        parts: dict[str, Tensor] = {part.removeprefix(leaf): tensors[0] for part, tensors in input_dict.items()}
        return {name: decode(packed.kind, parts, packed.shape)}
