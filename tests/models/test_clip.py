"""What `--method clip` shares with CLIP, against transformers' CLIPModel with the same random weights.

The same: the image tower of timm's ``*_clip_*`` names with its class token, the projections of both sides, the scale
exp(logit_scale), the symmetric cross-entropy over all pairs of a step, and every gradient of these.

Not the same, and so put into both models here: the text tower. Ours is the BERT of the other methods, read at [CLS];
CLIP's is a causal Transformer of its own word pieces, read at the end of the text. BERT itself is held against
transformers' in ``test_stack.py``. Our projections have biases, which are 0 here; the last LayerNorm goes over all
tokens, in CLIP over [CLS] alone; and the scale is bounded in the step, where CLIP's own training bounds it and
transformers' model does not.
"""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.modeling_outputs import BaseModelOutputWithPooling

from simla_ray.config.load import load_run
from simla_ray.models.vision import MEAN, STD
from simla_ray.training.comm import Comm
from simla_ray.training.whole_step import Vectors, backward_over_step
from tests.models.toy import SHAPE, B, make_batch, make_model

WIDTH, HEADS, DEPTH, MLP, PX, PATCH, JOINT = 16, 2, 2, 4, 24, 8, 8
#: Activation of the released weights, and of models trained since -> timm's name of a tower with it.
TOWERS = {"quick_gelu": "vit_base_patch16_clip_quickgelu_224", "gelu": "vit_base_patch16_clip_224"}
#: Of relative error, and in units of the largest value.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
NAMES = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.patch_embedding": "patch_embed.proj",
    "embeddings.position_embedding.weight": "pos_embed",
    "pre_layrnorm": "norm_pre",
    "post_layernorm": "norm",
    "encoder.layers": "blocks",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
}


class BertInClip(nn.Module):
    """Our text tower where CLIPModel has its own."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def forward(self, input_ids, attention_mask, position_ids=None, **options):
        states = self.text.encode(input_ids, attention_mask)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=states[:, 0])


def as_timm(theirs):
    """Tensors of CLIPVisionModel by name -> timm's; weights and their gradients alike."""
    found = {}
    for name, tensor in theirs.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([theirs[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            name = name.replace("self_attn.q_proj", "attn.qkv")
        for old, new in NAMES.items():
            name = name.replace(old, new)
        found[name] = tensor.view(1, 1, -1) if name == "cls_token" else tensor[None] if name == "pos_embed" else tensor
    return found


def both(activation, dtype):
    """Run, our model and theirs, with the same random weights."""
    shape = {name: value for name, value in SHAPE.items() if not name.startswith(("objectives.", "teacher."))}
    shape |= {"vision.timm": TOWERS[activation], "vision.depth": DEPTH, "vision.heads": HEADS, "vision.mlp_ratio": MLP}
    run = load_run(overrides={"method": "clip", **shape, "objectives.itc.weight": 1.0})
    ours = make_model(run).to(dtype)
    of_vision = {
        "hidden_size": WIDTH, "intermediate_size": MLP * WIDTH, "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS, "image_size": PX, "patch_size": PATCH, "hidden_act": activation,
    }  # fmt: skip
    of_text = {"hidden_size": run.text.width, "num_attention_heads": HEADS, "num_hidden_layers": 1, "vocab_size": 99}
    torch.manual_seed(1)
    theirs = CLIPModel(CLIPConfig(vision_config=of_vision, text_config=of_text, projection_dim=JOINT)).train()
    with torch.no_grad():
        for parameter in theirs.parameters():  # so that no LayerNorm, bias or position is left at its start
            parameter.add_(0.2 * torch.randn_like(parameter))
        student = ours.student
        student.vision.vit.load_state_dict(as_timm(theirs.vision_model.state_dict()))
        for mine, other in ((student.vision_proj, "visual_projection"), (student.text_proj, "text_projection")):
            mine.weight.copy_(getattr(theirs, other).weight)
            mine.bias.zero_()
        ours.scale.log_scale.copy_(theirs.logit_scale)
    theirs.text_model = BertInClip(copy.deepcopy(student.text))
    return run, ours, theirs.to(dtype)


def micro_batches(dtype, n=2):
    found = [make_batch(seed, floats=True) for seed in range(n)]
    for batch in found:
        batch.image = batch.image.to(dtype)
    return found


def assert_same(mine, other, dtype, name=""):
    bound = TOLERANCE[dtype]
    atol = bound * max(1.0, float(other.abs().max()))
    torch.testing.assert_close(mine, other, rtol=bound, atol=atol, msg=lambda said: f"{name} {said}")


CASES = pytest.mark.parametrize(
    ("activation", "dtype"), [(a, d) for a in TOWERS for d in TOLERANCE], ids=lambda value: str(value)
)


@CASES
@torch.no_grad()
def test_image_tokens_and_vectors_are_clips(activation, dtype):
    _, ours, theirs = both(activation, dtype)
    (batch,) = micro_batches(dtype, 1)
    tokens = ours.student.vision(batch.image)
    seen = theirs.vision_model(pixel_values=batch.image)
    assert_same(tokens[:, 0], seen.pooler_output, dtype)
    assert_same(tokens, theirs.vision_model.post_layernorm(seen.last_hidden_state), dtype)
    vectors = theirs.visual_projection(seen.pooler_output)
    assert_same(ours.student.image_vector(tokens), vectors / vectors.norm(dim=-1, keepdim=True), dtype)


@CASES
def test_the_loss_of_a_step_and_its_gradients_are_clips(activation, dtype):
    """Ours in two micro-batches, as the step does it; theirs of all pairs at once."""
    run, ours, theirs = both(activation, dtype)
    batches = micro_batches(dtype)
    term = backward_over_step(run, Vectors(ours), ours, list(enumerate(batches)), Comm())
    images, ids, mask = (
        torch.cat([getattr(b, name) for b in batches]) for name in ("image", "token_ids", "token_mask")
    )
    found = theirs(input_ids=ids, pixel_values=images, attention_mask=mask, return_loss=True)
    found.loss.backward()
    assert len(found.logits_per_image) == 2 * B
    assert_same(term.loss.detach(), found.loss.detach(), dtype)
    assert_same(1 / ours.temperature.detach(), theirs.logit_scale.detach().exp(), dtype)
    assert_same(ours.scale.log_scale.grad, theirs.logit_scale.grad, dtype, "logit_scale")
    assert theirs.logit_scale.grad.abs() > 1e-3
    student = ours.student
    assert_same(student.vision_proj.weight.grad, theirs.visual_projection.weight.grad, dtype, "visual_projection")
    assert_same(student.text_proj.weight.grad, theirs.text_projection.weight.grad, dtype, "text_projection")
    of_tower = as_timm({name: p.grad for name, p in theirs.vision_model.named_parameters()})
    mine = dict(student.vision.vit.named_parameters())
    assert mine.keys() == of_tower.keys()
    for name, grad in of_tower.items():
        assert_same(mine[name].grad, grad, dtype, name)
    of_text = {name: p.grad for name, p in theirs.text_model.text.named_parameters() if p.grad is not None}
    for name, parameter in student.text.named_parameters():
        assert (parameter.grad is None) == (name not in of_text), name
        if parameter.grad is not None:
            assert_same(parameter.grad, of_text[name], dtype, name)


def test_pixels_and_the_scale_begin_as_clips():
    assert list(MEAN) == OPENAI_CLIP_MEAN and list(STD) == OPENAI_CLIP_STD
    run = load_run(overrides=["method=clip", "size=tiny"])
    assert math.log(1 / run.temperature.init) == pytest.approx(CLIPConfig().logit_scale_init_value, abs=1e-4)
    assert 1 / run.temperature.min == pytest.approx(100)  # where CLIP's training clips exp(logit_scale)
