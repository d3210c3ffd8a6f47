"""Loading: which memory a checkpoint holds, conversion into another, and the earlier file layouts."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from memkern.models._xlnet import legacy
from memkern.models._xlnet.config import backbone_fields

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_FORGOTTEN_ARGUMENTS = ("resume_download", "commit_hash")
"""Arguments of earlier releases that no longer mean anything."""


def with_fields(config: Any, fields: dict[str, Any]) -> Any:
    """A checked copy of a memory config with other memory fields; the backbone's and the rest stay."""
    kept = config.to_dict()
    if "memory_slots" in fields and "mem_token_count" not in fields and config.model_type == "gmm_xlnet":
        kept.pop("mem_token_count", None)
    made = type(config)(**{**kept, **fields})
    made._attn_implementation = config._attn_implementation
    return made


def load(cls: Any, path: Any, args: tuple[Any, ...], config: Any, kwargs: dict[str, Any]) -> Any:
    """:meth:`MemoryXLNet.from_pretrained`."""
    config_class = cls.config_class
    given = {
        config_class.aliases.get(n, n): n for n in kwargs if config_class.aliases.get(n, n) in _fields(config_class)
    }
    fields = {name: kwargs.pop(original) for name, original in given.items()}
    for name in _FORGOTTEN_ARGUMENTS:
        kwargs.pop(name, None)
    if "use_auth_token" in kwargs:
        kwargs["token"] = kwargs.pop("use_auth_token")
    if isinstance(config, PreTrainedConfig) or path is None:
        if isinstance(config, config_class) and fields:
            config = with_fields(config, fields)
        return _finished(cls._load_with_config(path, args, config, kwargs))

    hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    source = path if config is None else config
    found, _ = PreTrainedConfig.get_config_dict(source, **hub)
    earlier = legacy.find(path)
    kind = found.get("memory_type", "standard") if earlier is None else earlier.memory_type
    own = earlier is None and found.get("model_type") == config_class.model_type
    wanted = ("gmm",) if config_class.model_type == "gmm_xlnet" else ("token", "differentiable")
    if kind == "standard":
        keep = {} if not own else {name: found[name] for name in _fields(config_class) if name in found}
        base = found if own else backbone_fields(found)
        settled, unused = _config(config_class, {**base, **keep, **fields}, kwargs)
        return _finished(cls._load_with_config(path, args, settled, unused))
    if kind not in wanted and not _asks_for_conversion(config_class, fields):
        keywords = " or ".join(f"{name}=" for name in config_class.type_fields)
        raise ValueError(
            f"{path} holds a checkpoint of memory type {kind!r}, and {cls.__name__} here is of type "
            f"{' or '.join(map(repr, wanted))}; give an explicit keyword ({keywords}) to convert it"
        )

    holder = _class_of(kind)
    if earlier is not None:
        settled, unused = _config(holder.config_class, {**backbone_fields(found), **earlier.fields}, kwargs)
        unused.pop("output_loading_info", None)
        model = _finished(holder._load_with_config(path, args, settled, unused))
        notes = earlier.fill(model)
    else:
        settled, unused = _config(holder.config_class, found, kwargs)
        if holder is cls and not _changes(settled, fields):
            return _finished(cls._load_with_config(path, args, settled, unused))
        unused.pop("output_loading_info", None)
        model, notes = _finished(holder._load_with_config(path, args, settled, unused)), []
    if holder is not cls or _changes(model.config, fields):
        same = holder is cls
        target = cls(model, **{**_memory_part(model.config, same, fields), **fields})
        target.name_or_path = model.name_or_path
        notes += [f"initialised: {name}" for name in target.load_overlapping(model)]
        lost = [name for name, _ in model.memory_named_parameters() if name not in dict(target.named_parameters())]
        notes += [f"not used: {name}" for name in lost]
        model = target
        model.eval()
        what = f"converted from memory type {kind!r} to {model.memory_type!r}"
    else:
        what = f"read from an earlier layout of memory type {kind!r}"
    if notes:
        warnings.warn(f"{path}: {what}; " + ", ".join(notes), stacklevel=3)
    return model


def _fields(config_class: Any) -> set[str]:
    return set(config_class.memory_fields)


def _config(config_class: Any, fields: dict[str, Any], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A config from a dict, with those keywords that name one of its fields; and the other keywords."""
    fields = {name: value for name, value in fields.items() if name not in ("model_type", "transformers_version")}
    attention = kwargs.get("attn_implementation")
    made = config_class(**fields)
    unused = {}
    for name, value in kwargs.items():
        if hasattr(made, name) and name not in ("dtype", "torch_dtype", "name_or_path", "attn_implementation"):
            setattr(made, name, value)
        else:
            unused[name] = value
    if attention is not None:
        unused["attn_implementation"] = attention
    return made, unused


def _memory_part(config: Any, same: bool, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that a converted model takes over: all of its own kind, else those that both kinds have."""
    if same:
        kept = {name: getattr(config, name) for name in config.memory_fields}
        if "memory_slots" in fields and "mem_token_count" not in fields and config.model_type == "gmm_xlnet":
            del kept["mem_token_count"]
        return kept
    shared = ("read_injection", "strict_memory_tokens", "memory_backend", "bptt_segments", "cls_token_id")
    return {name: getattr(config, name) for name in shared}


def _changes(config: Any, fields: dict[str, Any]) -> bool:
    """Whether ``fields`` ask for anything that the checkpoint's config does not say already."""
    return any(getattr(config, name) != value for name, value in fields.items())


def _asks_for_conversion(config_class: Any, fields: dict[str, Any]) -> bool:
    return any(name in fields for name in config_class.type_fields)


def _class_of(kind: str) -> Any:
    from memkern.models.gmm_xlnet import GMMXLNetForQA
    from memkern.models.memxlnet import MemXLNetForQA

    classes = {"token": MemXLNetForQA, "differentiable": MemXLNetForQA, "gmm": GMMXLNetForQA}
    if kind not in classes:
        raise ValueError(f"memory type {kind!r} is none of XLNet's: {', '.join(map(repr, classes))}")
    return classes[kind]


def _finished(loaded: Any) -> Any:
    """What transformers returned, with the experts' weights laid side by side again."""
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    updater = getattr(model, "expert_updater", None)
    if updater is not None:
        updater.pack()
    return loaded


def copy_overlap(target: nn.Module, source: nn.Module) -> list[str]:
    """Copy parameters of the memory by name as far as both reach; see :meth:`MemoryXLNet.load_overlapping`."""
    theirs = dict(source.named_parameters())
    partial = []
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if not target.is_memory_parameter(name):  # type: ignore[operator]
                continue
            other = theirs.get(name)
            if other is None:
                partial.append(name)
                continue
            if name.startswith("memory_controller.") and _heads(target) != _heads(source):
                _copy_heads(name, parameter, other, _heads(target), _heads(source))
                partial.append(name)
                continue
            part = tuple(slice(0, min(a, b)) for a, b in zip(parameter.shape, other.shape, strict=True))
            parameter[part].copy_(other[part])
            if parameter.shape != other.shape:
                partial.append(name)
    return partial


def _heads(model: nn.Module) -> int:
    controller = getattr(model, "memory_controller", None)
    return 0 if controller is None else int(controller.num_heads)


def _copy_heads(name: str, parameter: Tensor, other: Tensor, heads: int, their_heads: int) -> None:
    """Parameters of the controller are laid out head by head, and read modes as (head, 1 + 2 heads) besides."""
    both = min(heads, their_heads)
    if "read_modes" in name:
        mine = parameter.view(heads, 1 + 2 * heads, *parameter.shape[1:])
        theirs = other.view(their_heads, 1 + 2 * their_heads, *other.shape[1:])
        # Backward by write head, content, forward by write head.
        mine[:both, :both].copy_(theirs[:both, :both])
        mine[:both, heads].copy_(theirs[:both, their_heads])
        mine[:both, heads + 1 : heads + 1 + both].copy_(theirs[:both, their_heads + 1 : their_heads + 1 + both])
        return
    if "output_proj.weight" in name:
        width = parameter.shape[1] // heads
        parameter[:, : both * width].copy_(other[:, : both * width])
        return
    if "output_proj.bias" in name:
        parameter.copy_(other)
        return
    width = parameter.shape[0] // heads
    parameter[: both * width].copy_(other[: both * width])
