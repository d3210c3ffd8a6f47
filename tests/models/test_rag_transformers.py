"""Both models as transformers models: dtype and device_map loading, Trainer, PEFT, torch.compile, DDP, FSDP2."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from memkern.models.hybrid import HybridTransformerConfig, HybridTransformerModel
from memkern.models.self_rag import SelfRAGConfig, SelfRAGModel, SelfRAGTransformer
from memkern.testing import distributed


def self_rag():
    torch.manual_seed(0)
    config = SelfRAGConfig(
        d_model=16, n_heads=2, n_layers=2, d_ff=16, vocab_size=40, max_seq_len=48, top_k=2, retrieval_method="learned",
        dropout=0.0, attention_dropout=0.0, memory_dropout=0.0,
    )  # fmt: skip
    model = SelfRAGModel(SelfRAGTransformer(config), config=config)
    model.write_to_memory(["a", "b", "c"], [[1, 2, 3], [4, 5], [6, 7, 8]])
    return model


def hybrid(**settings):
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    settings = settings or {"use_gated_retrieval": True}
    model = HybridTransformerModel(HybridTransformerConfig(text, memory_slots=4, **settings))
    if model.config.use_external_memory:
        model.write_external_memory(torch.randint(1, 40, (1, 8)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "internal_proj" in name or "external_proj" in name:
                p.normal_(std=0.3)
    return model


@pytest.fixture(params=[self_rag, hybrid])
def model(request):
    return request.param()


def test_loading_in_bfloat16(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    ids = torch.randint(1, 40, (2, 6))
    logits = again(ids, labels=ids).logits.float()
    assert logits.isfinite().all()
    full = model.eval()(ids).logits
    torch.testing.assert_close(logits, full, rtol=0.1, atol=0.1)
    assert again.generate(ids, max_new_tokens=2, do_sample=False).shape == (2, 8)


def test_autocast(model):
    ids = torch.randint(1, 40, (2, 6))
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_trainer(model, tmp_path):
    draw = torch.Generator().manual_seed(0)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 40, (8, 6), generator=draw)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        report_to=[],
        save_steps=3,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:2])
    before = model.get_input_embeddings().weight.detach().clone()
    trainer.train()
    assert not torch.equal(model.get_input_embeddings().weight, before)
    assert trainer.evaluate()["eval_loss"] > 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3").eval()
    ids = torch.randint(1, 40, (1, 6))
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_accumulated_losses_are_those_of_the_whole_batch(model):
    model.eval()
    ids = torch.randint(1, 40, (4, 6))
    whole = model(ids, labels=ids, use_cache=False).loss
    count = 4 * (5 if isinstance(model, HybridTransformerModel) else 6)
    parts = [model(part, labels=part, num_items_in_batch=count).loss for part in ids.split(2)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)


def blocks(model):
    decoder = model.backbone.get_decoder()
    return next(m for m in decoder.children() if isinstance(m, torch.nn.ModuleList))


class TestDeviceMap:
    @pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
    def test_loading(self, model, tmp_path, device_map):
        ids = torch.randint(1, 40, (2, 6))
        expected = model.eval()(ids).logits
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map).eval()
        assert torch.equal(again(ids).logits, expected)

    def test_blocks_of_the_backbone_wait_on_disk(self, model, tmp_path):
        ids = torch.randint(1, 40, (2, 6))
        expected = model.eval()(ids).logits
        model.save_pretrained(tmp_path / "model")
        last = f"backbone.model.layers.{len(blocks(model)) - 1}"
        owners = {
            name.rpartition(".")[0]
            for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
        }
        places = {name: "cpu" for name in owners if name.startswith("backbone.") and not name.startswith(last)}
        places |= {name: "cpu" for name in ("memory_layers", "score") if hasattr(model, name)} | {last: "disk"}
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
        ).eval()
        assert any(p.is_meta for p in blocks(again)[-1].parameters())
        assert torch.equal(again(ids).logits, expected)


class TestAdapters:
    @pytest.fixture
    def peft(self):
        return pytest.importorskip("peft")

    def test_only_they_learn_and_they_come_back(self, model, peft, tmp_path):
        ids = torch.randint(1, 40, (4, 6))
        plain = copy.deepcopy(model)
        frozen = {name: p.clone() for name, p in model.named_parameters()}
        settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(model, settings)
        assert all("lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
        for _ in range(3):
            loss = adapted(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        adapted.eval()
        assert adapted(input_ids=ids, labels=ids).loss < loss
        for name, before in frozen.items():
            head, _, tail = name.rpartition(".")
            within = adapted.base_model.model.get_submodule(head)
            assert torch.equal(getattr(getattr(within, "base_layer", within), tail), before), name
        expected = adapted(input_ids=ids).logits
        generated = adapted.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        assert generated.shape == (4, 9)
        adapted.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
        assert torch.equal(again(input_ids=ids).logits, expected)
        merged = again.merge_and_unload()
        assert type(merged) is type(plain)
        torch.testing.assert_close(merged(ids).logits, expected)

    def test_the_memory_can_learn_beside_them(self, peft, tmp_path):
        parts = ["internal_proj", "external_proj", "fusion_gate"]
        settings = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=parts, r=2)
        adapted = peft.get_peft_model(hybrid(), settings)
        ids = torch.randint(1, 40, (2, 6))
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
        for _ in range(2):
            adapted(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        learning = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
        for part in (*parts, "lora_B"):
            assert any(part in name for name in learning), part
        adapted.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(hybrid(), tmp_path).eval()
        assert torch.equal(again(input_ids=ids).logits, adapted.eval()(input_ids=ids).logits)

    def test_adapted_states_are_embedded_anew(self, peft):
        model = self_rag().eval()
        before = model.embed(torch.tensor([[1, 2, 3]]))
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj"], r=2))
        with torch.no_grad():
            for name, p in adapted.named_parameters():
                if "lora_" in name:
                    p.normal_(std=2.0)
        model.write_to_memory("a", [1, 2, 3])
        stored = model.memory.embeddings[-1]
        assert not torch.allclose(stored, before[0], atol=1e-3)
        torch.testing.assert_close(stored, model.eval().embed(torch.tensor([[1, 2, 3]]))[0])


class TestCompile:
    def test_the_memory_runs_within_one_graph(self):
        torch._dynamo.reset()
        model = hybrid(use_gated_retrieval=True, gate_input="token").train()
        ids = torch.randint(1, 40, (2, 6))
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        found, expected = compiled(ids, labels=ids, use_cache=False), model(ids, labels=ids, use_cache=False)
        torch.testing.assert_close(found.logits, expected.logits)
        torch.testing.assert_close(found.new_memory_state, expected.new_memory_state)
        memory = dict(model.memory_layers["0"].named_parameters())
        names = ("g_retrieve", "internal_proj.weight", "external_proj.weight")
        actual, wanted = (torch.autograd.grad(out.loss, [memory[name] for name in names]) for out in (found, expected))
        torch.testing.assert_close(actual, wanted)

    @torch.no_grad()
    def test_a_scalar_gate_decides_outside_of_the_graphs(self):
        torch._dynamo.reset()
        model = hybrid(use_gated_retrieval=True).eval()
        ids = torch.randint(1, 40, (2, 6))
        compiled = torch.compile(model, backend="eager")
        for threshold in (0.0, 1.0):
            model.external_memory.set_threshold(threshold)
            model.reset_memory()
            actual = compiled(ids, use_cache=False).logits
            model.reset_memory()
            torch.testing.assert_close(actual, model(ids, use_cache=False).logits)

    @torch.no_grad()
    def test_self_rag_is_a_graph_on_either_side_of_the_store(self):
        torch._dynamo.reset()
        model = self_rag().eval()
        ids = torch.randint(1, 40, (2, 6))
        graphs = []

        def backend(module, inputs):
            graphs.append(module)
            return module.forward

        torch.testing.assert_close(torch.compile(model, backend=backend)(ids).logits, model(ids).logits)
        assert len(graphs) == 2


def batch(model, rows):
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 40, (4, 6), generator=draw)
    made = {"input_ids": ids[rows], "labels": ids[rows]}
    return made | ({"positive_ids": torch.tensor([0, 1, 2, 0])[rows]} if isinstance(model, SelfRAGModel) else {})


def equal_one(rank):
    for make in (self_rag, hybrid):
        single = make().train()
        single(**batch(single, slice(0, 4))).loss.backward()
        expected = {name: p.grad for name, p in single.named_parameters() if p.grad is not None}
        mine = batch(single, slice(2 * rank, 2 * rank + 2))
        ddp = DistributedDataParallel(make().train())
        for _ in range(2):  # a parameter without gradient would stop the second step
            ddp.zero_grad()
            ddp(**mine).loss.backward()
        sharded = make().train()
        mesh = init_device_mesh("cpu", (2,))
        for block in blocks(sharded):
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        sharded(**mine).loss.backward()
        grads = {name: p.grad.full_tensor() for name, p in sharded.named_parameters() if p.grad is not None}
        assert expected.keys() <= grads.keys()
        for name, p in ddp.module.named_parameters():
            wanted = expected.get(name, torch.zeros_like(p))
            torch.testing.assert_close(p.grad, wanted, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(grads.get(name, torch.zeros_like(p)), wanted, atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            logits = sharded.eval()(mine["input_ids"]).logits
            torch.testing.assert_close(logits, single.eval()(mine["input_ids"]).logits)
        if isinstance(sharded, SelfRAGModel):
            sharded.unshard()
            for model in (single, sharded):
                model.write_to_memory("d", [9, 1, 2, 3])
            torch.testing.assert_close(sharded.memory.embeddings[-1], single.memory.embeddings[-1])
    assert abs(sharded.memory_layers["0"].gate_value() - 0.6225) < 1e-3


def test_two_processes_equal_one_under_ddp_and_fsdp2():
    distributed.spawn(equal_one)
