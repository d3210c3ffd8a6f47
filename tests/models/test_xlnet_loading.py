"""Saving and loading: ours, plain XLNet, other memory types, the earlier layouts; Auto classes, dtypes, devices."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    XLNetForQuestionAnsweringSimple,
    XLNetModel,
)

from memkern.models import GMMXLNetConfig, GMMXLNetForQA, MemXLNetConfig, MemXLNetForQA


def run(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Logits of two segments."""
    first = model(**inputs)
    second = model(**inputs, memory_state=first.new_memory_state)
    return [first.start_logits, second.end_logits]


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def test_round_trip(base: Any, segment: Any, awake: Any, kind: Any, tmp_path: Path) -> None:
    model = awake(kind(base))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["memory_type"] == model.memory_type
    assert isinstance(config["memory_format_version"], int)
    assert (tmp_path / "model.safetensors").is_file()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for loader in (type(model), AutoModelForQuestionAnswering, AutoModel):
            loaded = loader.from_pretrained(tmp_path)
            assert type(loaded) is type(model)
            assert_same(run(model, segment()), run(loaded, segment()))
            assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])
    config_class = type(AutoConfig.from_pretrained(tmp_path))
    assert config_class in (GMMXLNetConfig, MemXLNetConfig)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()


@pytest.mark.parametrize("make", [lambda b: GMMXLNetForQA(b, use_gmm_memory=False), MemXLNetForQA])
def test_off_round_trip_and_turning_it_on(base: Any, segment: Any, make: Any, tmp_path: Path) -> None:
    make(base).save_pretrained(tmp_path)
    loaded = make(base).from_pretrained(tmp_path)
    assert loaded.memory_type == "standard"
    assert torch.equal(loaded(**segment()).start_logits, base(**segment()).start_logits)
    assert GMMXLNetForQA.from_pretrained(tmp_path, use_gmm_memory=True, num_experts=3).memory_type == "gmm"
    assert MemXLNetForQA.from_pretrained(tmp_path, mem_token_count=3).memory_type == "token"


def memory_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.memory_named_parameters()}


@pytest.mark.parametrize("bare", [False, True], ids=["with head", "backbone"])
def test_a_plain_checkpoint_gets_the_same_finite_memory_twice(base: Any, bare: bool, kind: Any, tmp_path: Path) -> None:
    (base.transformer if bare else base).save_pretrained(tmp_path)
    template = kind(base)
    options = {name: getattr(template.config, name) for name in template.config.memory_fields}
    options.pop("mem_read_ids"), options.pop("mem_write_ids")
    loaded = []
    for _ in range(2):
        torch.manual_seed(11)
        loaded.append(type(template).from_pretrained(tmp_path, **options))
    first, second = (memory_of(model) for model in loaded)
    assert set(first) == set(memory_of(template))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert value.isfinite().all(), name
        assert value.abs().max() < 10, name
        if name.endswith(".bias") and ("gate_networks" in name or "memory_gate" in name):
            assert torch.equal(value, torch.full_like(value, -1.0)), name  # gates that keep
            continue
        zero = name.endswith(".bias") or "memory_fusion.output" in name
        assert bool(value.any()) != zero, name
    torch.manual_seed(11)
    built = memory_of(type(template)(template.config))
    for name, value in built.items():  # the same distribution as a model that was built
        torch.testing.assert_close(value.std(), first[name].std(), atol=0.3 * float(value.std()) + 1e-12, rtol=0)
    assert torch.equal(loaded[0].transformer.word_embedding.weight, base.transformer.word_embedding.weight)


def test_orthogonal_experts_after_loading_a_bare_backbone(base: Any, tmp_path: Path) -> None:
    base.transformer.save_pretrained(tmp_path)
    model = GMMXLNetForQA.from_pretrained(tmp_path, num_experts=3, memory_slots=5)
    for expert in model.memory_mixture.get_all_experts():
        torch.testing.assert_close(expert @ expert.T, torch.eye(5), atol=1e-5, rtol=0)


SOURCES = {
    "token": (MemXLNetForQA, {"mem_token_count": 3}),
    "differentiable": (MemXLNetForQA, {"use_differentiable_memory": True, "memory_slots": 5, "num_memory_heads": 2}),
    "gmm": (GMMXLNetForQA, {"num_experts": 3, "memory_slots": 3}),
}


@pytest.mark.parametrize("source", SOURCES)
def test_another_type_of_memory_is_refused_or_converted(base: Any, segment: Any, source: str, tmp_path: Path) -> None:
    make, options = SOURCES[source]
    make(base, **options).save_pretrained(tmp_path)
    targets = {
        "gmm": (GMMXLNetForQA, {"num_experts": 2, "memory_slots": 4}),
        "differentiable": (MemXLNetForQA, {"use_differentiable_memory": True}),
        "token": (MemXLNetForQA, {"mem_token_count": 4, "use_differentiable_memory": False}),
    }
    for name, (target, keywords) in targets.items():
        if name == source:
            continue
        if target is not make:
            with pytest.raises(ValueError, match=f"{source!r}.*{'gmm' if name == 'gmm' else 'token'}"):
                target.from_pretrained(tmp_path)
            with pytest.raises(ValueError, match="memory type"):
                target.from_pretrained(tmp_path, memory_backend="reference")
        with pytest.warns(UserWarning, match=f"converted from memory type {source!r} to {name!r}.*initialised: "):
            loaded = target.from_pretrained(tmp_path, **keywords)
        assert loaded.memory_type == name
        assert torch.equal(loaded.transformer.word_embedding.weight, base.transformer.word_embedding.weight)
        assert torch.equal(loaded.qa_outputs.weight, base.qa_outputs.weight)
        assert loaded(**segment()).loss.isfinite()
        assert not loaded.training
    hybrid = json.loads((tmp_path / "config.json").read_text()) | {"memory_type": "hybrid"}
    (tmp_path / "config.json").write_text(json.dumps(hybrid))
    with pytest.raises(ValueError, match="'hybrid'"):
        GMMXLNetForQA.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'hybrid' is none of XLNet's"):
        GMMXLNetForQA.from_pretrained(tmp_path, num_experts=2)
    newer = hybrid | {"memory_type": source, "memory_format_version": 99}
    (tmp_path / "config.json").write_text(json.dumps(newer))
    with pytest.raises(ValueError, match="memory_format_version 99 is newer"):
        make.from_pretrained(tmp_path)


def test_keywords_override_fields_of_the_same_type(base: Any, segment: Any, tmp_path: Path) -> None:
    model = GMMXLNetForQA(base, 3, 4, read_injection="input")
    model.save_pretrained(tmp_path)
    warm = GMMXLNetForQA.from_pretrained(tmp_path, routing_temperature=2.0, memory_backend="reference", dropout=0.0)
    assert warm.gating_network.temperature == 2.0
    assert warm.config.dropout == 0.0
    assert warm.expert_updater.backend == "reference"
    for name, value in memory_of(model).items():
        assert torch.equal(memory_of(warm)[name], value)
    with pytest.warns(UserWarning, match="initialised: memory_fusion"):
        both = GMMXLNetForQA.from_pretrained(tmp_path, read_injection="both")
    assert both(**segment()).loss.isfinite()
    with pytest.warns(UserWarning, match="initialised: memory_mixture._expert_params.0"):
        wider = GMMXLNetForQA.from_pretrained(tmp_path, num_experts=5, memory_slots=6)
    assert wider.memory_slots == wider.config.mem_token_count == 6
    assert torch.equal(wider.memory_mixture._expert_params[2][:4], model.memory_mixture._expert_params[2])
    assert torch.equal(
        wider.gating_network.routing_projection.weight[:3], model.gating_network.routing_projection.weight
    )
    assert torch.equal(wider.expert_updater.gate_networks[1].weight, model.expert_updater.gate_networks[1].weight)
    loaded, info = GMMXLNetForQA.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    explicit = GMMXLNetForQA.from_pretrained(tmp_path, config=loaded.config, routing_temperature=3.0)
    assert explicit.gating_network.temperature == 3.0


def test_heads_and_slots_grow_by_their_overlap(base: Any, segment: Any) -> None:
    flags = {"use_differentiable_memory": True, "enable_temporal_links": True, "enable_usage_tracking": True}
    small = MemXLNetForQA(base, num_memory_heads=1, memory_slots=4, **flags)
    large = MemXLNetForQA(base, num_memory_heads=3, memory_slots=8, **flags)
    partly = large.load_overlapping(small)
    assert "memory_controller.read_keys.weight" in partly
    assert torch.equal(large.memory_controller.read_keys.weight[:32], small.memory_controller.read_keys.weight)
    assert torch.equal(large.memory_controller.write_gate.weight[:1], small.memory_controller.write_gate.weight)
    assert torch.equal(large.memory_controller.output_proj.weight[:, :32], small.memory_controller.output_proj.weight)
    modes = large.memory_controller.read_modes.weight.view(3, 7, 32)[0]
    kept = small.memory_controller.read_modes.weight.view(3, 32)
    assert torch.equal(modes[[0, 3, 4]], kept)  # backward, content, forward of the first write head
    assert torch.equal(large.memory_fusion.value.weight, small.memory_fusion.value.weight)
    assert large(**segment()).loss.isfinite()
    again = MemXLNetForQA(base, num_memory_heads=1, memory_slots=9, **flags)
    assert again.load_overlapping(small) == []


def legacy_base(base: Any, folder: Path) -> None:
    base.save_pretrained(folder)


def test_the_earlier_gmm_layout(base: Any, segment: Any, tmp_path: Path) -> None:
    legacy_base(base, tmp_path)
    model = GMMXLNetForQA(base, 4, 3, "read-based", routing_temperature=0.5)
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name in ("memory_mixture", "gating_network", "expert_updater", "memory_reader"):
        groups[name] = {key: value.clone() for key, value in getattr(model, name).state_dict().items()}
    torch.save(groups, tmp_path / "gmm_state.pt")
    config = {
        "model_class": "GMMXLNetForQA",
        "memory_type": "gmm",
        "version": "1.0",
        "num_experts": 4,
        "memory_slots": 3,
        "routing_mode": "read-based",
        "routing_temperature": 0.5,
        "pooling_method": "mean",
        "use_gmm_memory": True,
        "mem_token_count": 16,
        "hidden_dim": 32,
    }
    (tmp_path / "gmm_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="initialised: memory_write_embeddings"):
        loaded = GMMXLNetForQA.from_pretrained(tmp_path)
    assert loaded.config.routing_temperature == 0.5
    assert loaded.config.routing_mode == "read-based"
    for name, group in groups.items():
        for key, value in group.items():
            assert torch.equal(getattr(loaded, name).state_dict()[key], value), (name, key)
    assert loaded(**segment()).loss.isfinite()
    with pytest.raises(ValueError, match=r"'gmm'.*'token' or 'differentiable'"):
        MemXLNetForQA.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="converted from memory type 'gmm' to 'token'"):
        assert MemXLNetForQA.from_pretrained(tmp_path, mem_token_count=2).memory_type == "token"
    with pytest.warns(UserWarning, match="converted"):
        assert GMMXLNetForQA.from_pretrained(tmp_path, num_experts=2).num_experts == 2
    (tmp_path / "gmm_config.json").write_text(json.dumps(config | {"num_experts": 3}))
    with pytest.raises(ValueError, match=r"expected 3 experts.*got 4"):
        GMMXLNetForQA.from_pretrained(tmp_path)
    (tmp_path / "gmm_config.json").write_text(json.dumps(config | {"use_gmm_memory": False}))
    assert GMMXLNetForQA.from_pretrained(tmp_path, num_experts=3).memory_type == "gmm"
    (tmp_path / "gmm_config.json").write_text(json.dumps(config | {"memory_type": "token"}))
    with pytest.raises(ValueError, match="expected memory type 'gmm', got 'token'"):
        GMMXLNetForQA.from_pretrained(tmp_path)
    (tmp_path / "gmm_config.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        GMMXLNetForQA.from_pretrained(tmp_path)


TOKEN_CONFIG = {
    "wrapper_class": "MemXLNetForQA",
    "mem_token_count": 3,
    "memory_update": "gated",
    "memory_init": "learned",
    "use_differentiable_memory": False,
    "num_memory_heads": 1,
    "memory_sharpness": 1.0,
    "enable_usage_tracking": False,
    "enable_temporal_links": False,
    "memory_slots": None,
    "version": 3,
}


@pytest.mark.parametrize("version", [1, 3])
def test_the_earlier_token_layout(base: Any, segment: Any, version: int, tmp_path: Path) -> None:
    legacy_base(base, tmp_path)
    learned = torch.randn(3, 32)
    gate, update = torch.nn.Linear(64, 32).state_dict(), torch.nn.Linear(64, 32).state_dict()
    if version == 1:
        torch.save({"init_memory": learned, "gate": gate}, tmp_path / "memxlnet_state.pt")
        update = gate
    else:
        groups = {"learned_memory": learned, "memory_gate": gate, "memory_update_net": update}
        torch.save(groups, tmp_path / "memxlnet_state.pt")
    (tmp_path / "memxlnet_config.json").write_text(json.dumps(TOKEN_CONFIG | {"version": version}))
    with pytest.warns(UserWarning, match="initialised: memory_write_embeddings"):
        loaded = MemXLNetForQA.from_pretrained(tmp_path)
    assert torch.equal(loaded.learned_memory, learned)
    assert torch.equal(loaded.memory_gate.weight, gate["weight"])
    assert torch.equal(loaded.memory_update_net.weight, update["weight"])
    assert loaded(**segment()).loss.isfinite()
    loaded.save_pretrained(tmp_path / "ours")
    assert_same(run(loaded, segment()), run(MemXLNetForQA.from_pretrained(tmp_path / "ours"), segment()))
    other = TOKEN_CONFIG | {"memory_update": "sum", "memory_init": "noise"}
    (tmp_path / "memxlnet_config.json").write_text(json.dumps(other))
    with pytest.warns(UserWarning, match=r"earlier layout of memory type 'token'.*no counterpart: "):
        loaded = MemXLNetForQA.from_pretrained(tmp_path)
    assert (loaded.config.memory_update, loaded.config.memory_init) == ("replace", "zeros")
    torch.save({"learned_memory": torch.zeros(5, 32)}, tmp_path / "memxlnet_state.pt")
    (tmp_path / "memxlnet_config.json").write_text(json.dumps(TOKEN_CONFIG))
    with pytest.raises(ValueError, match="learned_memory: the checkpoint holds"):
        MemXLNetForQA.from_pretrained(tmp_path)
    (tmp_path / "memxlnet_state.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"memxlnet_state.pt is damaged"):
        MemXLNetForQA.from_pretrained(tmp_path)


def test_the_earlier_controller_addresses_by_content_alone(base: Any, segment: Any, tmp_path: Path) -> None:
    legacy_base(base, tmp_path)
    heads, slots = 2, 5
    sizes = {"read_keys": 64, "write_keys": 64, "write_vectors": 64, "erase_vectors": 64}
    sizes |= {"read_strengths": 2, "write_strengths": 2, "write_gate": 2, "read_gate": 2}
    state = {
        f"{name}.{key}": value
        for name, size in sizes.items()
        for key, value in torch.nn.Linear(32, size).state_dict().items()
    }
    state |= {f"output_proj.{key}": value for key, value in torch.nn.Linear(64, 32).state_dict().items()}
    state |= {"memory.memory": torch.zeros(slots, 32), "memory.usage": torch.zeros(slots)}
    torch.save({"memory_controller": state}, tmp_path / "memxlnet_state.pt")
    config = TOKEN_CONFIG | {
        "use_differentiable_memory": True,
        "num_memory_heads": heads,
        "memory_slots": slots,
        "enable_usage_tracking": True,
        "enable_temporal_links": True,
        "memory_sharpness": 2.0,
    }
    (tmp_path / "memxlnet_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"no counterpart: memory_controller\.read_gate\.weight"):
        loaded = MemXLNetForQA.from_pretrained(tmp_path)
    assert loaded.memory_type == "differentiable"
    assert loaded.config.memory_sharpness == 2.0
    controller = loaded.memory_controller
    assert torch.equal(controller.read_keys.weight, state["read_keys.weight"])
    interface = controller.interface(torch.randn(3, 32))
    assert interface.allocation_gates.max() < 1e-6
    assert interface.free_gates.max() < 1e-6
    assert interface.read_modes[:, :, heads].min() > 1 - 1e-6
    assert loaded(**segment()).loss.isfinite()


def test_the_earlier_layout_without_memory(base: Any, segment: Any, tmp_path: Path) -> None:
    legacy_base(base, tmp_path)
    (tmp_path / "memxlnet_config.json").write_text(json.dumps(TOKEN_CONFIG | {"mem_token_count": 0}))
    loaded = MemXLNetForQA.from_pretrained(tmp_path, use_auth_token=None, resume_download=False)
    assert loaded.memory_type == "standard"
    assert torch.equal(loaded(**segment()).start_logits, base(**segment()).start_logits)


def test_bfloat16(base: Any, segment: Any, kind: Any, tmp_path: Path) -> None:
    model = kind(base)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    state = None
    for index in range(2):
        out = loaded(**segment(index), memory_state=state)
        state = out.new_memory_state
    out.loss.backward()
    assert out.loss.isfinite()
    (tmp_path / "plain").mkdir()
    base.save_pretrained(tmp_path / "plain")
    plain = MemXLNetForQA.from_pretrained(tmp_path / "plain", dtype="bfloat16", mem_token_count=2)
    assert plain(**segment()).loss.isfinite()
    off = MemXLNetForQA.from_pretrained(tmp_path / "plain", dtype="bfloat16")
    assert off(**segment()).loss.isfinite()
    assert type(model)(copy.deepcopy(base).bfloat16(), **SOURCES[model.memory_type][1]).dtype == torch.bfloat16


def test_device_map(base: Any, segment: Any, main_kind: Any, tmp_path: Path) -> None:
    model = main_kind(base)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, device_map="cpu")
    assert_same(run(model, segment()), run(loaded, segment()))


def test_attention_implementations(base: Any, segment: Any, awake: Any, tmp_path: Path) -> None:
    model = awake(GMMXLNetForQA(base, 2, 3))
    assert model.config._attn_implementation == "eager"
    inputs = segment(padding=3)
    eager = model(**inputs)
    eager.loss.backward()
    gradient = model.transformer.layer[0].rel_attn.r_s_bias.grad.clone()
    model.zero_grad()
    model.set_attn_implementation("sdpa")
    fused = model(**inputs)
    fused.loss.backward()
    torch.testing.assert_close(fused.start_logits, eager.start_logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.transformer.layer[0].rel_attn.r_s_bias.grad, gradient, atol=1e-5, rtol=1e-3)
    assert len(model(**inputs, output_attentions=True).attentions) == 2
    model.save_pretrained(tmp_path)
    loaded = GMMXLNetForQA.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert loaded.config._attn_implementation == "sdpa"
    torch.testing.assert_close(loaded(**inputs).start_logits, fused.start_logits)
    assert GMMXLNetForQA.from_pretrained(tmp_path).config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="attn_implementation must be 'eager' or 'sdpa'"):
        GMMXLNetForQA.from_pretrained(tmp_path, attn_implementation="flex_attention")


def test_our_checkpoints_open_as_plain_xlnet(base: Any, segment: Any, tmp_path: Path) -> None:
    GMMXLNetForQA(base, 2, 3).save_pretrained(tmp_path)
    plain = XLNetForQuestionAnsweringSimple.from_pretrained(tmp_path)
    assert torch.equal(plain(**segment()).start_logits, base(**segment()).start_logits)
    encoder = XLNetModel.from_pretrained(tmp_path)
    assert torch.equal(encoder.word_embedding.weight, base.transformer.word_embedding.weight)
