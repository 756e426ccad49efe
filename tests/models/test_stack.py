"""The stack against transformers' BERT with the same weights, and its own promises about memory and attention."""

import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from simla_ray.config.schema import Text
from simla_ray.errors import UserError
from simla_ray.models.checkpoint_io import load_bert
from simla_ray.models.stack import Attentions, Memory, Stack
from simla_ray.models.text import TextModel

SHAPE = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 20, "initializer_range": 0.3,
}  # fmt: skip


def text_config(**changes):
    shape = {"width": 16, "depth": 3, "heads": 4, "ffn": 24, "max_positions": 20, "dropout": 0.1}
    return Text(**{**shape, **changes})


def inputs(B=3, L=6):
    ids = torch.randint(1, 40, (B, L))
    mask = torch.arange(L) < torch.tensor([[L], [4], [2]])
    return ids.masked_fill(~mask, 0), mask


@pytest.fixture(scope="module")
def saved_bert(tmp_path_factory):
    torch.manual_seed(3)
    bert = BertForMaskedLM(BertConfig(**SHAPE)).eval()
    with torch.no_grad():  # biases and type vectors that are not zero, so that leaving one out shows
        for name, p in bert.named_parameters():
            if "bias" in name or "token_type" in name:
                p.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("bert")
    bert.save_pretrained(folder)
    return bert, folder


def loaded(folder, **changes):
    text = TextModel(text_config(**changes), 40, memory_width=16, mlm_head=True).eval()
    load_bert(text, str(folder), fold_type0=True)
    return text


def test_text_only_equals_bert(saved_bert):
    bert, folder = saved_bert
    text = loaded(folder)
    ids, mask = inputs()
    with torch.no_grad():
        theirs = bert.bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        ours = text.encode(ids, mask)
        logits, their_logits = text.word_logits(ours), bert(input_ids=ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[mask], their_logits[mask], atol=1e-5, rtol=1e-5)


def test_folding_type_zero_is_what_makes_them_equal(saved_bert):
    bert, folder = saved_bert
    text = TextModel(text_config(), 40, memory_width=None, mlm_head=True).eval()
    load_bert(text, str(folder), fold_type0=False)
    types = bert.bert.embeddings.token_type_embeddings.weight
    theirs = bert.bert.embeddings.position_embeddings.weight
    torch.testing.assert_close(text.embeddings.position_embeddings.weight, theirs)  # the official code drops the vector
    load_bert(text, str(folder), fold_type0=True)
    torch.testing.assert_close(text.embeddings.position_embeddings.weight, theirs + types[0])


def test_a_text_model_without_mlm_head_takes_bert_weights(saved_bert):
    text = TextModel(text_config(), 40, memory_width=None, mlm_head=False)
    load_bert(text, str(saved_bert[1]), fold_type0=True)
    theirs = saved_bert[0].bert.encoder.layer[2].output.dense.weight
    torch.testing.assert_close(text.encoder.layer[2].output.dense.weight, theirs)


@pytest.mark.parametrize("change", [{"depth": 4}, {"depth": 2}, {"heads": 2}])
def test_weights_of_another_depth_or_head_count_are_refused(saved_bert, change):
    text = TextModel(text_config(**change), 40, memory_width=None, mlm_head=True)
    with pytest.raises(UserError, match=r"text\.weights: .* has 3 layers of 4 heads"):
        load_bert(text, str(saved_bert[1]), fold_type0=True)


@pytest.mark.parametrize("change", [{"ffn": 32}, {"width": 32}, {"max_positions": 24}])
def test_weights_of_another_shape_are_refused(saved_bert, change):
    text = TextModel(text_config(**change), 40, memory_width=None, mlm_head=True)
    with pytest.raises(UserError, match=r"text\.weights.*shape"):
        load_bert(text, str(saved_bert[1]), fold_type0=True)


def test_a_folder_without_weights_is_refused(tmp_path):
    text = TextModel(text_config(), 40, memory_width=None, mlm_head=False)
    with pytest.raises(UserError, match=r"text\.weights"):
        load_bert(text, str(tmp_path), fold_type0=True)


def test_cross_attention_equals_berts_decoder_without_the_causal_mask():
    config = BertConfig(**SHAPE, is_decoder=True, add_cross_attention=True, attn_implementation="eager")
    torch.manual_seed(4)
    bert = BertModel(config, add_pooling_layer=False).eval()
    text = TextModel(text_config(), 40, memory_width=16, mlm_head=False).eval()
    state = {k: v for k, v in bert.state_dict().items() if "token_type" not in k and "position_ids" not in k}
    state["embeddings.position_embeddings.weight"] = (
        state["embeddings.position_embeddings.weight"] + bert.embeddings.token_type_embeddings.weight[0]
    )
    text.load_state_dict(state)  # strict: the names are the same
    ids, mask = inputs()
    states, memory_mask = torch.randn(3, 5, 16), torch.arange(5) < torch.tensor([[5], [3], [1]])
    full = torch.zeros(3, 1, 6, 6).masked_fill(~mask[:, None, None, :], -1e9)  # 4-D masks are added as they are
    with torch.no_grad():
        theirs = bert(
            input_ids=ids, attention_mask=full, encoder_hidden_states=states,
            encoder_attention_mask=memory_mask.long(), use_cache=False,
        ).last_hidden_state  # fmt: skip
        ours = text.encode(ids, mask, Memory(states, memory_mask))
    torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-5, rtol=1e-5)


def stack(memory_width=12, dropout=0.0):
    torch.manual_seed(0)
    s = Stack(2, 16, 4, 24, dropout, memory_width)
    with torch.no_grad():
        for p in s.parameters():
            if p.ndim > 1:
                p.normal_(std=0.3)
    return s


def test_memory_index_equals_repeating_rows():
    s = stack()
    x, states = torch.randn(5, 4, 16), torch.randn(3, 6, 12)
    memory_mask = torch.rand(3, 6) < 0.7
    memory_mask[:, 0] = True
    index = torch.tensor([2, 0, 0, 1, 2])
    mask = torch.ones(5, 4, dtype=torch.bool)
    shared = s(x, mask, Memory(states, memory_mask, index))
    repeated = s(x, mask, Memory(states[index], memory_mask[index]))
    torch.testing.assert_close(shared, repeated)
    leaf = states.clone().requires_grad_()
    s(x, mask, Memory(leaf, memory_mask, index)).square().sum().backward()
    again = states.clone().requires_grad_()
    s(x, mask, Memory(again[index], memory_mask[index])).square().sum().backward()
    torch.testing.assert_close(leaf.grad, again.grad, atol=1e-4, rtol=1e-4)


def test_masked_positions_do_not_matter():
    s = stack()
    x, states = torch.randn(2, 5, 16), torch.randn(2, 4, 12)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    memory_mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    before = s(x, mask, Memory(states, memory_mask))
    x2, states2 = x.clone(), states.clone()
    x2[0, 3:], states2[0, 2:] = 9, 9
    after = s(x2, mask, Memory(states2, memory_mask))
    torch.testing.assert_close(before[mask], after[mask])


def numpy_softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@torch.no_grad()
def test_cls_probabilities_equal_an_explicit_softmax():
    s = stack(dropout=0.5).train()  # before dropout: training mode changes nothing
    attention = s.layer[1].attention
    x, mask = torch.randn(2, 5, 16), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    got = attention.cls_probabilities(x, mask).numpy()
    q = attention.self["query"](x).numpy().reshape(2, 5, 4, 4)
    k = attention.self["key"](x).numpy().reshape(2, 5, 4, 4)
    for b in range(2):
        for h in range(4):
            scores = np.array([q[b, 0, h] @ k[b, j, h] / math.sqrt(4) for j in range(5)])
            scores[~mask[b].numpy()] = -np.inf
            np.testing.assert_allclose(got[b, h], numpy_softmax(scores), atol=1e-6)
    assert (got[0, :, 3:] == 0).all()


@torch.no_grad()
def test_kept_cls_attention_is_the_last_layers_self_attention():
    s = stack().eval()
    x, mask, memory = torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool), Memory(torch.randn(2, 3, 12))
    keep = Attentions(cls_rows=slice(None))
    s(x, mask, memory, keep)
    middle = s.layer[0](x, x, mask, memory)
    torch.testing.assert_close(keep.cls, s.layer[1].attention.cls_probabilities(middle, mask))
    assert keep.cls.shape == (2, 4, 5) and keep.cross == []


def test_keeping_cross_attention_changes_nothing():
    s = stack().eval()
    x, mask, memory = torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool), Memory(torch.randn(2, 3, 12))
    keep = Attentions(want_cross=True)
    torch.testing.assert_close(s(x, mask, memory, keep), s(x, mask, memory), atol=1e-5, rtol=1e-5)
    assert [tuple(p.shape) for p in keep.cross] == [(2, 4, 5, 3)] * 2
    torch.testing.assert_close(keep.cross[0].sum(-1), torch.ones(2, 4, 5))
    assert keep.cross[0].requires_grad


def test_image_queries_get_positions_and_the_embedding_norm():
    """(B, N, D) image tokens + BERT positions -> LayerNorm -> stack over the text memory; the caller's tensor stays."""
    text = TextModel(text_config(dropout=0.0), 40, memory_width=16, mlm_head=False).eval()
    tokens, memory = torch.randn(2, 10, 16), Memory(torch.randn(2, 4, 16))
    before = tokens.clone()
    at = torch.tensor([[1, 3], [0, 9]])
    got = text.query_with_image(tokens, memory, at)
    e = text.embeddings
    by_hand = e.LayerNorm(tokens + e.position_embeddings.weight[:10])
    every = text.encoder(by_hand, None, memory)
    torch.testing.assert_close(got, every.gather(1, at[:, :, None].expand(-1, -1, 16)))
    assert torch.equal(tokens, before)


def test_the_mlm_decoder_is_tied_to_the_word_embeddings():
    text = TextModel(text_config(), 40, memory_width=None, mlm_head=True)
    assert not any("decoder" in name for name, _ in text.named_parameters())
    hidden = torch.randn(1, 2, 16)
    text.word_logits(hidden).sum().backward()
    assert text.embeddings.word_embeddings.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("uses", ["words", "table", "both"])
def test_gradients_of_words_and_of_the_table_they_came_from_add_up(uses):
    text = TextModel(text_config(), 40, memory_width=None, mlm_head=True).double()
    weight = text.embeddings.word_embeddings.weight
    ids = torch.tensor([[5, 7, 5, 0], [7, 39, 0, 0]])  # words that come twice, and padding
    factor, hidden = torch.randn(2, 4, 16).double(), torch.randn(1, 2, 16).double()

    def loss(words, table):
        parts = {"words": (words * factor).sum(), "table": text.word_logits(hidden, table).pow(2).sum()}
        return sum(parts[name] for name in parts if uses in (name, "both"))

    words, table = text.embeddings.look_up(ids)
    assert torch.equal(words, weight[ids])
    (got,) = torch.autograd.grad(loss(words, table), weight)
    (expected,) = torch.autograd.grad(loss(text.embeddings.word_embeddings(ids), None), weight)
    torch.testing.assert_close(got, expected)
    assert (got.abs().sum(1) > 0).sum() == (3 if uses == "words" else 40)


def test_new_weights_are_drawn_like_berts():
    text = TextModel(text_config(width=64, ffn=256), 400, memory_width=64, mlm_head=False)
    for name, p in text.named_parameters():
        if "LayerNorm.weight" in name:
            assert (p == 1).all()
        elif "bias" in name:
            assert (p == 0).all()
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.15), name


def test_rows_read_in_turn_equal_repeated_ones():
    attention = stack().layer[0].crossattention
    counts = [2, 2, 0, 3, 1, 1]
    x, states = torch.randn(9, 4, 16), torch.randn(6, 5, 12)
    row = torch.repeat_interleave(torch.arange(6), torch.tensor(counts))
    expected = attention(x, *attention.project(states[row]), None)
    torch.testing.assert_close(attention.in_turn(x, *attention.project(states), counts), expected)
