"""The instruments, on things whose cost is known; and the cost of our step at full size."""

import time

import pytest
import torch
import torch.nn.functional as F

from simla_ray.config.enums import Method
from simla_ray.errors import UserError
from simla_ray.models.stack import Attention
from simla_ray.training import measure
from simla_ray.training.contenders import SHAPES, Workshop
from simla_ray.training.measure import Spread

CPU, MIB = torch.device("cpu"), 2**20
TINY = Workshop(SHAPES["tiny"], CPU, 4)


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_has_the_longest_captions_and_real_masks():
    run = TINY.run()
    batch = TINY.batch(run)
    B, L, P = 4, run.text.max_tokens, run.grid**2
    assert batch.image.shape == (B, 3, 48, 48) and batch.image.dtype == torch.uint8
    assert batch.token_mask.shape == (B, L) and batch.token_mask.all()
    assert (batch.token_ids[:, 0] == measure.CLS_ID).all() and batch.token_ids.max() < 256
    changed = (batch.masked_ids != batch.token_ids).nonzero().tolist()
    chosen = {(i, p.item()) for i in range(B) for p in batch.mlm_index[i][batch.mlm_weight[i] > 0]}
    assert changed and {tuple(c) for c in changed} <= chosen
    assert batch.patch_mask.shape == (1, P) and batch.codes.shape == (1, P)  # a quarter of the rows
    assert 0 < batch.patch_mask.sum() <= run.objectives.mim.mask_ratio * P
    assert not batch.keyword_ok[:, 0].any() and batch.keyword_ok[:, 1:].all()
    assert batch.image_id.unique().numel() == B


def test_mixed_captions_are_padded_to_the_longest():
    batch = TINY.batch(TINY.run(), mixed=True)
    assert batch.token_mask.sum(1).tolist() == [8, 12, 16, 20]
    assert batch.token_ids.shape == (4, 20) and not batch.token_ids[0, 8:].any()


def test_noise_of_two_towers_has_no_masked_images():
    batch = TINY.batch(TINY.run(Method.clip))
    assert batch.codes is None and len(batch.patch_mask) == 0


# --- seconds ----------------------------------------------------------------------------------------------------------


def test_tasks_take_turns_and_warm_up():
    order, lines = [], []
    tasks = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measure.interleaved(tasks, 3, CPU, lines.append, warm_up=2)
    assert order == ["a", "b"] * 5
    assert [len(t) for t in times.values()] == [3, 3]
    assert [line.split()[0] for line in lines] == ["warm", "warm", "round", "round", "round"]
    assert lines[-1].startswith("round      3 of 3: a ")


def test_seconds_are_of_the_cpu():
    def busy():
        x = torch.rand(400, 400)
        for _ in range(20):
            x = x @ x / 200

    assert measure.seconds(busy, CPU) > 1e-3 > measure.seconds(lambda: time.sleep(0.05), CPU)


def test_too_little_memory_on_a_gpu_is_the_users_to_know():
    def task():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="--batch: big does not fit the GPU's memory; use a smaller batch"):
        measure.interleaved({"big": task}, 1, CPU)


def test_ratios_are_taken_within_rounds():
    slow, fast = [2.0, 8.0, 3.0], [1.0, 4.0, 1.0]
    assert Spread.of(slow) == Spread(3.0, 2.0, 8.0)
    assert Spread.of_ratio(slow, fast) == Spread(2.0, 2.0, 3.0)


# --- floating-point operations ----------------------------------------------------------------------------------------


def test_attention_is_counted_as_its_products_forward_and_backward():
    B, H, M, S, d = 2, 3, 5, 7, 4
    query, key, value = (torch.empty(B, H, n, d, device="meta", requires_grad=True) for n in (M, S, S))
    found = measure.flops(lambda: F.scaled_dot_product_attention(query, key, value).sum())
    assert found == 3 * 2 * (2 * B * H * M * S * d)  # two products, two more for the gradients of each


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_attention_of_our_stack_is_counted_whole(dropout):
    R, D, M, S, H = 2, 16, 5, 7, 4
    with torch.device("meta"):
        attention = Attention(D, D, H, dropout).train()
        x, states = torch.empty(R, M, D, requires_grad=True), torch.empty(R, S, D, requires_grad=True)
    found = measure.flops(lambda: attention(x, *attention.project(states), None).sum())
    linear = 2 * R * (2 * M + 2 * S) * D * D  # query and output of M positions, key and value of S
    assert found == 3 * (linear + 2 * 2 * R * M * S * D)


def test_a_module_without_gradients_on_a_view_is_counted():
    linear = torch.nn.Linear(4, 4, device="meta")
    x = torch.empty(3, 5, 4, device="meta", requires_grad=True)

    def total():
        with torch.no_grad():
            linear((2 * x)[:, :1])
            linear(x[:, :1])
        return linear(x).sum()

    assert measure.flops(total) == 2 * (2 * 3 * 16) + 3 * (2 * 15 * 16)


def test_autocast_is_itself_again_after_counting():
    before = torch.autocast
    weight = torch.empty(3, 3, device="meta", requires_grad=True)

    def total():
        with torch.autocast("meta", enabled=False):
            return (weight @ weight).sum()

    assert measure.flops(total) == 3 * 2 * 27
    assert torch.autocast is before


@pytest.mark.parametrize(("method", "least", "most"), [("simla", 650, 715), ("clip", 130, 155)])
def test_flops_of_our_step_at_full_size(method, least, most):
    """ViT-B/16 at 256 px, captions of 25 tokens, queue 65,536, without the visual tokenizer; GF per pair."""
    workshop = Workshop(SHAPES["base"], CPU, 2)
    run = workshop.run(Method(method))
    assert (run.vision.image_px, run.text.max_tokens, run.queue) == (256, 25, 65536 if method == "simla" else 0)
    assert least <= workshop.flops(run, workshop.batch(run)) / 2e9 <= most


PEAKS = {
    "NVIDIA H200": (989e12, 67e12),
    "NVIDIA H100 PCIe": (756e12, 51e12),
    "NVIDIA H100 80GB HBM3": (989e12, 67e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 19.5e12),
    "NVIDIA L40S": (362e12, 91.6e12),
    "NVIDIA L4": (121e12, 30.3e12),
    "Quadro P400": (None, None),
}


@pytest.mark.parametrize("name", PEAKS)
def test_peaks_are_found_by_the_gpus_name(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = tuple(measure.peak_flops(torch.device("cuda", 0), t) for t in (torch.bfloat16, torch.float32))
    assert found == PEAKS[name]
    assert measure.peak_flops(CPU, torch.float32) is None


# --- matmul share and memory ------------------------------------------------------------------------------------------


def test_the_share_of_products_is_that_of_self_time():
    a, b = torch.rand(600, 600), torch.rand(2_000_000)
    assert measure.look_inside(lambda: [a @ a for _ in range(5)], CPU).matmul_share > 0.5
    assert measure.look_inside(lambda: [b.exp() for _ in range(5)], CPU).matmul_share < 0.05
    for name in ("aten::mm", "aten::convolution_backward", "aten::_scaled_dot_product_flash_attention_for_cpu"):
        assert measure.is_product(name)
    for name in ("aten::mul", "aten::_to_copy", "aten::native_layer_norm", "Optimizer.step#AdamW.step"):
        assert not measure.is_product(name)


def test_peak_memory_is_that_of_tensors_alive_at_once(capfd):
    def task():
        a = torch.ones(MIB)
        b = a + 1
        del a
        return b * 2

    assert measure.look_inside(task, CPU).peak_bytes == pytest.approx(2 * 4 * MIB, rel=0.01)
    held = {"x": torch.ones(MIB)}

    def replace():
        held["x"] = held["x"] + 1  # two at once, of which the old one was there before

    assert measure.look_inside(replace, CPU).peak_bytes == pytest.approx(4 * MIB, rel=0.01)
    assert capfd.readouterr().err == ""


def test_held_bytes_count_shared_storage_once():
    layer = torch.nn.Linear(8, 8)
    both = torch.nn.ModuleList([layer, torch.nn.Linear(8, 8)])
    both[1].weight = layer.weight
    optimizer = torch.optim.AdamW(both.parameters())
    weights = 4 * (64 + 8 + 8)
    assert measure.held_bytes(both, optimizer) == weights
    sum(p.sum() for p in both.parameters()).backward()
    optimizer.step()
    assert measure.held_bytes(both, optimizer) == 3 * weights + 3 * 4  # two moments each, and a counter
