"""Self-RAG: embeddings, retrieval, augmentation, losses, generation and saving, over three backbones."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2Config, LlamaConfig

from memkern.models.self_rag import SelfRAGConfig, SelfRAGModel, SelfRAGTransformer
from memkern.store import MemoryStore

VOCABULARY, WIDTH = 60, 32


def configured(**changes):
    settings = {
        "d_model": WIDTH,
        "n_heads": 4,
        "n_layers": 2,
        "d_ff": 48,
        "vocab_size": VOCABULARY,
        "max_seq_len": 48,
        "max_chunks": 20,
        "chunk_size": 8,
        "chunk_overlap": 2,
        "top_k": 3,
        "memory_dropout": 0.0,
    }
    return SelfRAGConfig(**{**settings, **changes})


def backbone(kind, config):
    torch.manual_seed(0)
    if kind == "own":
        return SelfRAGTransformer(config)
    if kind == "llama":
        sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes))
    return AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, eos_token_id=0)
    )


def built(kind="own", **changes):
    config = configured(**changes)
    return SelfRAGModel(backbone(kind, config), config=config).eval()


def tokens(count, length, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY - 2, (count, length), generator=draw)


def filled(model, count=6):
    texts = [f"chunk {i}" for i in range(count)]
    return model.write_to_memory(texts, [tokens(1, 3 + i % 3, seed=i)[0].tolist() for i in range(count)])


@pytest.fixture(params=["own", "llama", "gpt2"])
def kind(request):
    return request.param


class TestConfig:
    def test_defaults_and_presets_are_those_of_the_contract(self):
        config = SelfRAGConfig()
        assert (config.d_model, config.n_layers, config.n_heads, config.d_ff) == (512, 12, 8, 2048)
        assert (config.vocab_size, config.max_seq_len, config.max_chunks) == (32000, 1024, 10000)
        assert (config.chunk_size, config.chunk_overlap, config.top_k) == (64, 16, 5)
        assert (config.memory_dropout, config.contrastive_weight) == (0.1, 0.1)
        tiny = SelfRAGConfig.from_preset("tiny", top_k=2)
        assert (tiny.d_model, tiny.n_layers, tiny.top_k, tiny.max_chunks) == (192, 4, 2, 1000)

    def test_yaml_round_trip(self, tmp_path):
        config = configured(retrieval_method="learned", top_k=7)
        config.to_yaml(tmp_path / "config.yaml")
        again = SelfRAGConfig.from_yaml(tmp_path / "config.yaml")
        assert again.to_dict() == config.to_dict()
        (tmp_path / "short.yaml").write_text("preset: small\ntop_k: 2\n")
        assert (SelfRAGConfig.from_yaml(tmp_path / "short.yaml").d_model, again.top_k) == (384, 7)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"top_k": 0}, "top_k"),
            ({"retrieval_method": "bm25"}, "retrieval_method"),
            ({"embed_pooling": "sum"}, "embed_pooling"),
            ({"n_heads": 5}, "n_heads"),
            ({"chunk_overlap": 8}, "chunk_overlap"),
            ({"memory_dropout": 1.5}, "memory_dropout"),
            ({"contrastive_temperature": 0.0}, "contrastive_temperature"),
            ({"memory_format_version": 2}, "memory_format_version"),
        ],
    )
    def test_bad_values_are_named(self, change, named):
        with pytest.raises(ValueError, match=named):
            configured(**change)


class TestTransformer:
    def test_padding_on_either_side_changes_nothing(self):
        model = backbone("own", configured()).eval()
        ids = tokens(1, 7)
        alone = model(ids).logits[0]
        for before, after in ((3, 0), (0, 3)):
            padded = torch.nn.functional.pad(ids, (before, after))
            mask = torch.zeros_like(padded)
            mask[:, before : before + 7] = 1
            for form in (mask, mask.bool(), mask.float()):
                logits = model(padded, attention_mask=form).logits[0, before : before + 7]
                torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)

    def test_it_is_causal(self):
        model = backbone("own", configured()).eval()
        ids = tokens(1, 8)
        changed = ids.clone()
        changed[0, 5] = (changed[0, 5] + 1) % VOCABULARY
        assert torch.equal(model(ids).logits[0, :5], model(changed).logits[0, :5])
        assert not torch.equal(model(ids).logits[0, 5:], model(changed).logits[0, 5:])

    def test_generation_with_and_without_cache(self):
        model = backbone("own", configured()).eval()
        ids = torch.nn.functional.pad(tokens(2, 6), (2, 0))
        mask = (ids != 0).long()
        mask[1] = 1
        runs = [
            model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=use_cache)
            for use_cache in (True, False)
        ]
        assert torch.equal(*runs)

    def test_attention_implementations_agree(self):
        model = backbone("own", configured()).eval()
        ids = tokens(2, 9)
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        expected = model(ids, attention_mask=mask).logits[mask.bool()]
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask.bool()], expected, rtol=1e-5, atol=1e-5)
        attentions = model(ids, output_attentions=True, output_hidden_states=True)
        assert attentions.attentions[0].shape == (2, 4, 9, 9)
        assert len(attentions.hidden_states) == 3

    def test_checkpointing_keeps_loss_and_gradients(self):
        model = backbone("own", configured(dropout=0.0, attention_dropout=0.0)).train()
        ids = tokens(2, 9)
        gradients = []
        for checkpointing in (False, True):
            model.zero_grad()
            if checkpointing:
                model.gradient_checkpointing_enable()
            model(ids, labels=ids).loss.backward()
            gradients.append(model.lm_head.weight.grad.clone())
        assert torch.equal(*gradients)

    def test_outputs_answer_to_keys_and_come_as_tuples(self):
        model = backbone("own", configured()).eval()
        ids = tokens(1, 5)
        assert model(ids)["loss"] is None
        loss, logits, *_ = model(ids, labels=ids, return_dict=False)
        assert loss.dim() == 0
        assert logits.shape == (1, 5, VOCABULARY)

    def test_a_checkpoint_comes_back_with_its_rotary_angles(self, tmp_path):
        model = backbone("own", configured()).eval()
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(again) is SelfRAGTransformer
        assert torch.equal(again.model.rotary.inverse_frequencies, model.model.rotary.inverse_frequencies)
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))
        assert torch.equal(again(tokens(1, 6)).logits, model(tokens(1, 6)).logits)
        assert isinstance(AutoConfig.from_pretrained(tmp_path), SelfRAGConfig)

    def test_forward_embed_only_pools_final_states(self):
        model = backbone("own", configured()).eval()
        ids = tokens(2, 6)
        states = model.model(ids).last_hidden_state
        torch.testing.assert_close(model.forward_embed_only(ids), states.mean(1))
        assert torch.equal(model.forward_embed_only(ids, pooling="cls"), states[:, 0])


class TestEmbed:
    @pytest.mark.parametrize("pooling", ["mean", "last", "first", "cls"])
    def test_masks_count_on_either_side(self, kind, pooling):
        model = built(kind, embed_pooling=pooling)
        ids = tokens(1, 6)
        alone = model.embed(ids)
        torch.testing.assert_close(alone.norm(dim=-1), torch.ones(1))
        for before, after in ((4, 0), (0, 4), (2, 2)):
            padded = torch.nn.functional.pad(ids, (before, after), value=7)
            mask = torch.zeros_like(padded)
            mask[:, before : before + 6] = 1
            torch.testing.assert_close(model.embed(padded, mask), alone, rtol=1e-5, atol=1e-5)

    def test_no_gradient_at_inference_a_path_while_training_never_dropout(self):
        model = built(dropout=0.5)
        ids = tokens(2, 5)
        assert not model.embed(ids).requires_grad
        expected = model.embed(ids)
        model.train()
        row = model.embed(ids)
        assert torch.equal(row, expected)
        assert model.backbone.training
        assert all(m.training for m in model.modules())
        row.sum().backward()
        assert model.backbone.model.embed_tokens.weight.grad.abs().sum() > 0

    def test_a_row_of_padding_gives_zeros(self):
        model = built()
        mask = torch.tensor([[0, 0, 0], [1, 1, 1]])
        rows = model.embed(tokens(2, 3), mask)
        assert torch.equal(rows[0], torch.zeros(WIDTH))
        assert rows.isfinite().all()


class TestMemory:
    def test_batched_and_single_writes_agree(self, kind):
        model = built(kind)
        sequences = [tokens(1, n, seed=n)[0].tolist() for n in (2, 7, 4)]
        ids = model.write_to_memory(["a", "b", "c"], sequences, [{"n": 1}, None, {"n": 3}])
        together = model.memory.embeddings
        model.embedding_cache.clear()
        model.memory.clear()
        for text, sequence in zip("abc", sequences, strict=True):
            assert isinstance(model.write_to_memory(text, sequence), int)
        torch.testing.assert_close(model.memory.embeddings, together, rtol=1e-5, atol=1e-6)
        assert len(set(ids)) == 3

    def test_a_chunk_retrieves_itself(self, kind):
        model = built(kind)
        ids = filled(model)
        chunk = model.memory.get(ids[3])
        hits = model.retrieve(model.embed(torch.tensor([chunk.token_ids])))
        assert len(hits) == 1
        assert len(hits[0]) == 3
        assert hits[0][0].id == ids[3]
        assert hits[0][0].score == pytest.approx(1.0, abs=1e-5)
        assert model.retrieve(model.embed(torch.tensor([chunk.token_ids]))[0], 1)[0].id == ids[3]
        assert len(model.retrieve(torch.zeros(2, WIDTH), 50)[1]) == 6

    def test_the_cache_saves_work_until_a_parameter_changes(self):
        model = built()
        filled(model)
        assert (model.embedding_cache.hits, model.embedding_cache.misses) == (0, 6)
        filled(model)
        assert model.embedding_cache.hits == 6
        before = model.memory.embeddings[-1]
        with torch.no_grad():
            model.backbone.model.norm.weight[0] += 1.0
        filled(model)
        assert model.embedding_cache.misses == 12
        assert not torch.equal(model.memory.embeddings[-1], before)

    def test_groups_keep_documents_apart(self):
        model = built()
        sequence = tokens(1, 4)[0].tolist()
        for group in ("a", "b"):
            model.write_to_memory([group], [sequence], [{"group": group}])
        query = model.embed(torch.tensor([sequence, sequence, sequence]))
        found = model.retrieve(query, groups=["b", "a", "c"])
        assert [[hit.text for hit in row] for row in found] == [["b"], ["a"], []]

    def test_a_text_without_tokens_is_stored_and_scores_nothing(self, kind):
        model = built(kind)
        empty, full = model.write_to_memory(["", "x"], [[], [3, 4]]), model.write_to_memory("", [])
        assert len(model.memory) == 3
        scores = {hit.id: hit.score for hit in model.retrieve(model.embed(tokens(1, 4)))[0]}
        assert scores[empty[0]] == scores[full] == 0

    def test_without_tokens_or_tokenizer_the_argument_is_named(self):
        with pytest.raises(ValueError, match="token_ids"):
            built().write_to_memory("text")
        with pytest.raises(ValueError, match="token_ids"):
            built().write_to_memory(["a", "b"], [[1]])

    @pytest.mark.parametrize("method", ["dot", "learned"])
    def test_a_cosine_store_serves_every_method(self, method):
        own = built(retrieval_method=method)
        config = configured(retrieval_method=method)
        plain = SelfRAGModel(backbone("own", config), MemoryStore(WIDTH), config).eval()
        if method == "learned":
            with torch.no_grad():
                for model in (own, plain):
                    model.score.weight.add_(0.2 * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)))
        queries = own.embed(tokens(3, 5, seed=9))
        found = []
        for model in (own, plain):
            filled(model)
            found.append([hit for row in model.retrieve(queries) for hit in row])
        assert [hit.id for hit in found[0]] == [hit.id for hit in found[1]]
        assert [hit.score for hit in found[0]] == pytest.approx([hit.score for hit in found[1]], abs=1e-5)

    def test_a_store_that_does_not_fit_is_refused(self):
        config = configured()
        with pytest.raises(ValueError, match="memory"):
            SelfRAGModel(backbone("own", config), MemoryStore(WIDTH + 1), config)
        with pytest.raises(ValueError, match="retrieval_method"):
            SelfRAGModel(backbone("own", config), MemoryStore(WIDTH, retrieval_method="dot"), config)


class TestAugment:
    def test_form_labels_and_masks_row_by_row(self):
        model = built()
        mem, sep = model.memory_token_id, model.sep_token_id
        ids = torch.tensor([[0, 0, 11, 12], [13, 14, 15, 0]])
        mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
        labels = torch.tensor([[-100, -100, 11, 12], [-100, 14, 15, -100]])
        out = model.augment(ids, [[[1, 2], [3]], [[4]]], mask, labels)
        assert out.input_ids.tolist() == [
            [mem, 1, 2, mem, 3, sep, 11, 12],
            [mem, 4, sep, 13, 14, 15, 0, 0],
        ]
        assert out.attention_mask.tolist() == [[1] * 8, [1] * 6 + [0] * 2]
        assert out.labels.tolist() == [[-100] * 6 + [11, 12], [-100] * 4 + [14, 15] + [-100] * 2]
        left = model.augment(ids, [[[1, 2], [3]], []], mask.bool(), padding_side="left")
        assert left.input_ids.tolist()[1] == [0] * 5 + [13, 14, 15]
        assert left.labels is None

    @pytest.mark.parametrize("length", [1, 10, 24, 35, 47, 48, 49, 100])
    @pytest.mark.parametrize("chunks", [[3], [8] * 5, [60]])
    def test_a_long_row_keeps_its_separator_and_its_last_tokens(self, length, chunks):
        model = built()
        limit = model.config.max_seq_len
        ids = tokens(1, length)
        out = model.augment(ids, [[[5] * n for n in chunks]])
        row = out.input_ids[0].tolist()
        assert len(row) <= limit
        at = row.index(model.sep_token_id)
        rest = row[at + 1 :]
        assert rest == ids[0].tolist()[length - len(rest) :]
        assert len(rest) >= min(length, limit // 2)
        if length <= limit - limit // 4:
            assert len(rest) == length  # the prefix gives way first
        prefix = sum(n + 1 for n in chunks) + 1
        assert min(limit, prefix + length) - len(row) in (0, 1)  # a mark that no token follows is dropped

    def test_wrong_number_of_rows(self):
        with pytest.raises(ValueError, match="retrieved"):
            built().augment(tokens(2, 3), [[]])


class TestForward:
    def test_without_memory_it_is_the_backbone(self, kind):
        model = built(kind)
        ids = tokens(2, 6)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        alone = model.backbone(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(model(ids, mask).logits, alone)
        filled(model)
        assert torch.equal(model(ids, mask, use_memory=False).logits, alone)
        assert model(ids, mask)["loss"] is None

    def test_loss_is_that_of_each_row_alone(self, kind):
        model = built(kind, top_k=2)
        filled(model)
        ids = torch.tensor([[0, 0, 11, 12, 13], [21, 22, 23, 24, 25]])
        mask = (ids != 0).long()
        labels = ids.masked_fill(mask == 0, -100)
        found = model(ids, mask, labels, return_retrieved=True)
        rows = [model(ids[:1, 2:], None, labels[:1, 2:]), model(ids[1:], None, labels[1:])]
        # The first token of a row counts too: the separator predicts it.
        expected = (rows[0].loss * 3 + rows[1].loss * 5) / 8
        torch.testing.assert_close(found.loss, expected, rtol=1e-4, atol=1e-5)
        assert [len(row) for row in found.retrieved] == [2, 2]
        loss, logits, *_ = model(ids, mask, labels, return_dict=False)
        torch.testing.assert_close(loss, found.loss)
        assert logits.shape == found.logits.shape

    def test_a_row_past_the_backbones_positions_keeps_its_last_tokens(self):
        model = built("gpt2", max_seq_len=64)
        long = tokens(2, 70)
        mask = torch.ones_like(long)
        mask[1, 66:] = 0
        rows = (long[0, -64:], long[1, 2:66])
        for empty in (True, False):
            if not empty:
                filled(model)
            embedded, found = model.embed(long, mask), model(long, mask, labels=long, use_memory=not empty)
            for i, row in enumerate(rows):
                torch.testing.assert_close(embedded[i], model.embed(row[None])[0], rtol=1e-5, atol=1e-5)
                if empty:
                    alone = model(row[None], use_memory=False).logits[0]
                    torch.testing.assert_close(found.logits[i], alone, rtol=1e-4, atol=1e-5)
            assert found.logits.shape[1] == 64
            assert model.generate(long, mask, max_new_tokens=2, eos_token_id=None).shape == (2, 72)

    def test_what_is_predicted_does_not_choose_the_chunks(self):
        model = built(top_k=1)
        filled(model)
        ids = tokens(2, 6)
        ids[1, :3] = ids[0, :3]
        labels = ids.clone()
        labels[:, :3] = -100
        hits = model(ids, labels=labels, return_retrieved=True).retrieved
        assert hits[0][0].id == hits[1][0].id
        assert hits[0][0].score == hits[1][0].score

    def test_chunks_change_the_logits(self, kind):
        model = built(kind)
        ids = tokens(1, 5)
        last = [model(ids, retrieved=[[chunk]]).logits[0, -1] for chunk in ([3, 4], [5, 6])]
        assert not torch.equal(*last)

    def test_memory_dropout_drops_rows_in_training_alone(self):
        model = built(memory_dropout=0.5, dropout=0.0)
        filled(model)
        ids = tokens(8, 4).repeat(8, 1)
        torch.manual_seed(0)
        model.train()
        kept = [len(row) for row in model(ids, return_retrieved=True).retrieved]
        assert set(kept) == {0, 3}
        assert 16 < sum(n == 0 for n in kept) < 48
        model.eval()
        assert all(len(row) == 3 for row in model(ids, return_retrieved=True).retrieved)

    @pytest.mark.parametrize("method", ["cosine", "dot", "learned"])
    def test_contrastive_loss_is_info_nce_with_gradient_on_both_sides(self, method):
        model = built(retrieval_method=method, contrastive_weight=0.5, dropout=0.0, attention_dropout=0.0)
        stored = filled(model)
        ids = tokens(3, 5, seed=9)
        positives = torch.tensor([stored[1], -1, stored[4]])
        model.train()
        found = model(ids, labels=ids, positive_ids=positives)
        scores = model.embed(ids) @ model.memory.embeddings.t() / model.config.contrastive_temperature
        losses = -torch.log_softmax(scores, 1)
        torch.testing.assert_close(found.contrastive_loss, (losses[0, 1] + losses[2, 4]) / 2, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.loss, found.lm_loss + 0.5 * found.contrastive_loss)
        found.contrastive_loss.backward()
        used = model.memory.token_ids[1]
        gradient = model.backbone.model.embed_tokens.weight.grad
        assert gradient[used].abs().sum() > 0
        assert gradient[ids[0]].abs().sum() > 0
        if method == "learned":
            assert model.score.weight.grad.abs().sum() > 0

    def test_masked_documents_count_in_no_loss(self):
        model = built(dropout=0.0, attention_dropout=0.0)
        stored = filled(model)
        ids = tokens(2, 5)
        positives = torch.tensor([stored[0], stored[1]])
        mask = torch.tensor([True, False])
        both = model(ids, labels=ids, positive_ids=positives, document_mask=mask)
        alone = model(ids[:1], labels=ids[:1], positive_ids=positives[:1])
        torch.testing.assert_close(both.lm_loss, alone.lm_loss)
        torch.testing.assert_close(both.contrastive_loss, alone.contrastive_loss)

    def test_the_configured_backend_serves_every_search(self):
        from memkern.backends import BackendUnavailable

        model = built(memory_backend="reference")
        filled(model)
        assert model(tokens(1, 3), return_retrieved=True).retrieved[0]
        model.config.memory_backend = "cuda"
        if not torch.cuda.is_available():
            with pytest.raises(BackendUnavailable):
                model(tokens(1, 3))

    def test_an_unknown_positive_is_named(self):
        model = built()
        filled(model)
        with pytest.raises(ValueError, match="positive_ids"):
            model(tokens(1, 4), positive_ids=torch.tensor([77]))

    def test_large_stores_keep_the_positive_among_the_candidates(self):
        model = built(contrastive_candidates=4)
        stored = filled(model, 12)
        loss = model(tokens(2, 4), positive_ids=torch.tensor([stored[7], -1])).contrastive_loss
        assert loss.isfinite()
        assert loss > 0

    def test_the_learned_score_starts_as_the_identity_and_decides_the_search(self):
        model = built(retrieval_method="learned")
        stored = filled(model)
        query = model.memory.embeddings[2:3]
        assert model.retrieve(query)[0][0].id == stored[2]
        with torch.no_grad():
            model.score.weight.neg_()
        assert model.retrieve(query, 6)[0][-1].id == stored[2]


class TestGenerate:
    def test_input_then_new_tokens_whatever_the_padding(self, kind):
        model = built(kind)
        filled(model)
        ids = torch.tensor([[0, 0, 11, 12, 13], [21, 22, 23, 24, 25]])
        mask = (ids != 0).long()
        out = model.generate(ids, mask, max_new_tokens=4, do_sample=False)
        assert torch.equal(out[:, :5], ids)
        assert out.shape == (2, 9)
        alone = model.generate(ids[:1, 2:], max_new_tokens=4, do_sample=False)
        assert torch.equal(out[0, 5:], alone[0, 3:])
        plain = model.generate(ids, mask, max_new_tokens=4, do_sample=False, use_cache=False)
        assert torch.equal(out, plain)
        assert model.generate(ids, mask, max_length=7, do_sample=False).shape == (2, 7)

    def test_an_empty_store_generates_as_the_backbone_does(self):
        model = built()
        ids = tokens(2, 5)
        expected = model.backbone.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), expected)

    def test_several_sequences_and_dictionaries(self):
        model = built()
        filled(model)
        ids = tokens(2, 4)
        out = model.generate(
            ids, max_new_tokens=3, num_beams=2, num_return_sequences=2, do_sample=False, return_dict_in_generate=True
        )
        assert out.sequences.shape == (4, 7)
        assert torch.equal(out.sequences[:, :4], ids.repeat_interleave(2, 0))


class TestSaving:
    @pytest.mark.parametrize("method", ["cosine", "learned"])
    def test_round_trip_with_the_store(self, kind, method, tmp_path):
        model = built(kind, retrieval_method=method)
        stored = filled(model)
        if method == "learned":
            with torch.no_grad():
                model.score.weight.add_(0.1)
        model.save_pretrained(tmp_path)
        assert (tmp_path / "memory" / "store.json").exists()
        ids = tokens(2, 5)
        expected = model(ids).logits
        for again in (SelfRAGModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
            assert type(again) is SelfRAGModel
            assert again.memory.ids == stored
            assert torch.equal(again.eval()(ids).logits, expected)

    def test_a_given_backbone_keeps_its_weights(self):
        config = configured()
        base = backbone("own", config)
        extra = torch.nn.Linear(3, 3)
        base.adapter = extra
        before = {name: p.clone() for name, p in base.named_parameters()}
        SelfRAGModel(base, config=config)
        assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


class TestTokenizer:
    @pytest.fixture
    def tokenizer(self):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "the", "cat", "sat", "on", "mat"])}
        raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        raw.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")

    def test_missing_marks_are_added_with_a_note(self, tokenizer, tmp_path):
        config = configured(vocab_size=7)
        with pytest.warns(UserWarning, match=r"\[MEM\]"):
            model = SelfRAGModel(SelfRAGTransformer(config), config=config, tokenizer=tokenizer).eval()
        assert model.memory_token_id == 7
        assert model.sep_token_id == 8
        assert model.get_input_embeddings().weight.shape[0] == 9
        id = model.write_to_memory("the cat sat")
        assert model.memory.get(id).token_ids == [2, 3, 4]
        prompt = tokenizer(["the mat"], return_tensors="pt")["input_ids"]
        expected = model(prompt).logits
        model.save_pretrained(tmp_path)
        again = SelfRAGModel.from_pretrained(tmp_path).eval()
        assert again.tokenizer is not None
        assert torch.equal(again(prompt).logits, expected)
