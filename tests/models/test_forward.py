"""Passes and parameters: what is switched off leaves nothing behind (methods.md 6.3, row `simla`)."""

from collections import Counter

import pytest
import torch

from simla_ray.errors import UserError
from simla_ray.models.forward import Negatives
from tests.models.toy import CODES, NAMES, SUBSETS, VOCAB, B, L, N, make_batch, make_model, make_run, run_forward

subsets = pytest.mark.parametrize("on", SUBSETS, ids=["+".join(n for n in NAMES if n in s) for s in SUBSETS])


def count_passes(model):
    """Hooks that sum the rows of every pass, in units of B: "student vision", "teacher text over image", ..."""
    rows, calls = Counter(), Counter()

    def vision(who):
        def hook(module, args):
            rows[f"{who} vision"] += len(args[0]) / B
            calls[f"{who} vision"] += 1

        return hook

    def text(who):
        def hook(module, args):
            hidden, _, memory = (*args, None, None)[:3]
            if memory is None:
                kind = "text"
            else:
                kind = "text over image" if memory.states.shape[1] == N else "image over text"
                assert hidden.shape[1] == (L if kind == "text over image" else N)
                assert memory.states.shape[1] in (N, L)
            rows[f"{who} {kind}"] += len(hidden) / B
            calls[f"{who} {kind}"] += 1

        return hook

    towers = {"student": model.student}
    if model.teacher is not None:
        towers["teacher"] = model.teacher.towers
    for who, t in towers.items():
        t.vision.register_forward_pre_hook(vision(who))
        t.text.encoder.register_forward_pre_hook(text(who))
    return rows, calls


def expected_passes(on):
    """The table: each objective names the nodes it reads, a node is computed once."""
    itc, itm, mlm, mim, psl = (name in on for name in NAMES)
    contrast = itc or itm
    table = {
        "student vision": bool(on - {"mim"}) + mim,
        "student text": contrast,
        "student text over image": 3 * itm + mlm,
        "student image over text": mim,
        "teacher vision": bool(on - {"mim"}) + mim,
        "teacher text": contrast,
        "teacher text over image": mlm + psl,
        "teacher image over text": mim,
    }
    return {name: float(n) for name, n in table.items() if n}


def test_full_simla_makes_the_passes_of_the_table():
    run = make_run()
    model = make_model(run)
    rows, calls = count_passes(model)
    run_forward(model, run, make_batch())
    assert rows == {
        "student vision": 2, "student text": 1, "student text over image": 4, "student image over text": 1,
        "teacher vision": 2, "teacher text": 1, "teacher text over image": 2, "teacher image over text": 1,
    }  # fmt: skip
    assert set(calls.values()) == {1}  # passes through the same weights go together


@subsets
def test_every_subset_makes_its_own_passes_and_no_other(on):
    run = make_run(on)
    model = make_model(run)
    rows, calls = count_passes(model)
    _, terms = run_forward(model, run, make_batch())
    assert rows == expected_passes(on)
    assert set(calls.values()) == {1}
    assert set(terms) == on and all(t.loss.isfinite() for t in terms.values())


@subsets
def test_weight_zero_is_the_same_as_absent(on):
    absent = make_model(make_run(on))
    run = make_run(**{f"objectives__{name}__weight": 0.0 for name in NAMES if name not in on})
    zero = make_model(run)
    assert {n: p.shape for n, p in zero.named_parameters()} == {n: p.shape for n, p in absent.named_parameters()}
    rows, _ = count_passes(zero)
    _, terms = run_forward(zero, run, make_batch())
    assert rows == expected_passes(on) and set(terms) == on


@subsets
def test_a_phase_of_the_full_run_makes_the_passes_of_its_subset(on):
    run = make_run()
    model = make_model(run)
    rows, _ = count_passes(model)
    run_forward(model, run, make_batch(), active=on)
    assert rows == expected_passes(on)


@pytest.mark.parametrize(
    ("on", "changes", "gone"),
    [
        (NAMES, {"objectives__psl__attention": "student"}, {"teacher text over image": 1.0}),
        (NAMES, {"objectives__psl__select": "tfidf"}, {"teacher text over image": 1.0}),
        (NAMES, {"objectives__mlm__soft_alpha": 0}, {"teacher text over image": 1.0}),
        (NAMES, {"objectives__mim__soft_alpha": 0}, {"teacher vision": 1.0, "teacher image over text": 0.0}),
        (("psl",), {"objectives__psl__recommend": "off"}, {"teacher vision": 0.0}),
        (("psl",), {"objectives__psl__soft_alpha": 0}, {"teacher vision": 0.0}),
        (("mlm",), {"objectives__mlm__soft_alpha": 0}, {"teacher vision": 0.0, "teacher text over image": 0.0}),
    ],
)
def test_switches_save_their_passes(on, changes, gone):
    run = make_run(on, **changes)
    model = make_model(run)
    rows, _ = count_passes(model)
    run_forward(model, run, make_batch())
    assert rows == {n: c for n, c in {**expected_passes(set(on)), **gone}.items() if c}


def test_without_a_teacher_the_student_makes_the_keys():
    off = {f"objectives__{n}__soft_alpha": 0 for n in ("itc", "mlm", "mim", "psl")}
    run = make_run(teacher=None, objectives__psl__attention="student", **off)
    model = make_model(run)
    rows, _ = count_passes(model)
    record, terms = run_forward(model, run, make_batch(), alpha=0.0)
    assert rows == {
        "student vision": 2, "student text": 1, "student text over image": 4, "student image over text": 1
    }  # fmt: skip
    assert record.image_key is record.image_vec and record.text_key is record.text_vec
    assert set(terms) == set(NAMES)


def test_student_attention_without_itm_is_a_pass_of_its_own_without_gradient():
    run = make_run(("psl",), objectives__psl__attention="student")
    model = make_model(run)
    rows, _ = count_passes(model)
    record, _ = run_forward(model, run, make_batch())
    assert rows == {"student vision": 1, "student text over image": 1, "teacher vision": 1}
    assert not record.cls_attention.requires_grad


def test_a_batch_fraction_masks_the_first_rows_only():
    run = make_run(("itc", "mim"), objectives__mim__batch_fraction=0.5)
    model, batch = make_model(run), make_batch()
    for name in ("patch_mask", "mim_index", "mim_weight", "codes"):
        setattr(batch, name, getattr(batch, name)[: B // 2])
    rows, _ = count_passes(model)
    record, _ = run_forward(model, run, batch)
    assert rows["student vision"] == 1.5 and rows["student image over text"] == 0.5
    assert record.mim_logits.shape == (B // 2, 4, CODES)


ONLY_FOR = {
    "mim": [f"{who}.{name}" for who in ("student", "teacher.master") for name in ("mim_head.", "vision.mask_token")],
    "itm": ["itm_head."],
    "psl": ["student.concept_head.", "teacher.master.concept_head."],
    "mlm": ["student.text.cls.", "teacher.master.text.cls."],
}


@subsets
def test_an_objective_that_is_off_leaves_no_parameter_behind(on):
    names = [n for n, _ in make_model(make_run(on)).named_parameters()]
    for objective, prefixes in ONLY_FOR.items():
        for prefix in prefixes:
            assert any(n.startswith(prefix) for n in names) == (objective in on), prefix
    assert any("crossattention" in n for n in names) == bool(on - {"itc"})


def test_psl_controls_need_no_cross_attention():
    names = [n for n, _ in make_model(make_run(("itc", "psl"), objectives__psl__select="random")).named_parameters()]
    assert not any("crossattention" in n for n in names)


@pytest.mark.parametrize(
    ("prefix", "on", "changes"),
    [
        ("student.text_proj", ("mlm",), {}),
        ("student.vision_proj", ("mlm",), {}),
        ("teacher.", ("mlm",), {"objectives__mlm__soft_alpha": 0}),
        ("queue.", ("itm",), {"queue": 16}),
    ],
)
def test_what_no_objective_reads_is_not_built(prefix, on, changes):
    assert not any(n.startswith(prefix) for n in make_model(make_run(on, **changes)).state_dict())


def gradient_sets(model, run, batch, active):
    """Names that autograd reaches when everything may be reached, and names that are marked; marks cut no path."""
    trained = [(n, p) for n, p in model.named_parameters() if not n.startswith("teacher.")]
    reached = []
    for marks in (False, True):
        for _, p in trained:
            p.requires_grad_(True)
            p.grad = None
        if marks:
            model.trainable_in(set(active))
        torch.manual_seed(0)
        _, terms = run_forward(model, run, batch, active)
        sum(t.loss for t in terms.values()).backward()
        reached.append({n for n, p in model.named_parameters() if p.grad is not None})
    assert reached[0] == reached[1]
    return reached[0], {n for n, p in model.named_parameters() if p.requires_grad}


@subsets
def test_trainable_in_marks_exactly_what_gets_a_gradient(on):
    """What DistributedDataParallel waits for: alone, and as a phase of the full run, going back and forth."""
    run, batch = make_run(on), make_batch()
    got, marked = gradient_sets(make_model(run), run, batch, on)
    assert got == marked
    run = make_run()
    model = make_model(run)
    for active in (set(NAMES), on):
        got, marked = gradient_sets(model, run, batch, active)
        assert got == marked


@pytest.mark.parametrize(
    "changes",
    [
        {"variant": "official"},
        {"objectives__psl__attention": "student"},
        {"objectives__psl__select": "content"},
        {"objectives__mim__teacher_text": "teacher"},
        {"teacher": None, "objectives__psl__attention": "student"}
        | {f"objectives__{n}__soft_alpha": 0 for n in ("itc", "mlm", "mim", "psl")},
    ],
)
@pytest.mark.parametrize("on", [NAMES, ("psl",), ("itm", "psl"), ("mlm",), ("mim",), ("itc",)])
def test_trainable_in_holds_for_the_variants(on, changes):
    run = make_run(on, **{k: v for k, v in changes.items() if k.split("__")[1:2] == [] or k.split("__")[1] in on})
    got, marked = gradient_sets(make_model(run), run, make_batch(), on)
    assert got == marked


def test_a_batch_without_masked_words_or_patches_still_gives_every_gradient():
    """Otherwise one rank's empty micro-batch would leave the others waiting."""
    run, batch = make_run(), make_batch()
    batch.mlm_weight.zero_()
    batch.mim_weight.zero_()
    batch.patch_mask.zero_()
    batch.keyword_ok.zero_()
    got, marked = gradient_sets(make_model(run), run, batch, NAMES)
    assert got == marked


def test_passes_in_one_call_equal_passes_alone():
    """Each loss of the full forward equals that of a run with this objective only."""
    run, batch = make_run(), make_batch()
    model = make_model(run)
    shift = Negatives((torch.arange(B) + 1) % B, (torch.arange(B) + 2) % B)
    _, together = run_forward(model, run, batch, given=shift)
    for name in NAMES:
        _, alone = run_forward(model, run, batch, active={name}, given=shift)
        assert alone[name].loss.item() == pytest.approx(together[name].loss.item(), rel=1e-5), name


@torch.no_grad()
def test_the_record_by_hand():
    """Each pass once more, called by hand in the simplest way."""
    run, batch = make_run(queue=16), make_batch()
    model = make_model(run)
    for p in model.teacher.master.parameters():
        p.add_(0.02 * torch.randn_like(p))
    negatives = Negatives((torch.arange(B) + 1) % B, (torch.arange(B) + 2) % B)
    record, _ = run_forward(model, run, batch, given=negatives)
    from simla_ray.models.stack import Attentions, Memory

    s, t = model.student, model.teacher.master
    ids, mask = batch.token_ids, batch.token_mask

    def close(ours, theirs):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)

    def unit(x):
        return x / x.norm(dim=1, keepdim=True)

    image, teacher_image = s.vision(batch.image), t.vision(batch.image)
    close(record.image_vec, unit(s.vision_proj(image[:, 0])))
    close(record.image_key, unit(t.vision_proj(teacher_image[:, 0])))
    close(record.text_vec, unit(s.text_proj(s.text.encode(ids, mask)[:, 0])))
    close(record.text_key, unit(t.text_proj(t.text.encode(ids, mask)[:, 0])))
    pairs = [(b, b) for b in range(B)]
    pairs += [(b, int(negatives.image[b])) for b in range(B)]
    pairs += [(int(negatives.text[b]), b) for b in range(B)]
    for row, (text, picture) in enumerate(pairs):
        hidden = s.text.encode(ids[text, None], mask[text, None], Memory(image[picture, None]))
        close(record.match_logits[row], model.itm_head(hidden[0, 0]))
    for b in range(B):
        one = slice(b, b + 1)
        words = s.text.encode(batch.masked_ids[one], mask[one], Memory(image[one]))[0, batch.mlm_index[b]]
        close(record.mlm_logits[b], s.text.word_logits(words))
        words = t.text.encode(batch.masked_ids[one], mask[one], Memory(teacher_image[one]))[0, batch.mlm_index[b]]
        close(record.mlm_teacher[b], t.text.word_logits(words))
        keep = Attentions(cls_rows=slice(None))  # teacher weights, unmasked caption, the student's image
        t.text.encode(ids[one], mask[one], Memory(image[one]), keep)
        close(record.cls_attention[b], keep.cls[0])
        memory = s.text.embeddings(ids[one])  # of the unmasked caption, student's for both
        for tower, got in ((s, record.mim_logits), (t, record.mim_teacher)):
            tokens = tower.vision(batch.image[one], batch.patch_mask[one])
            at = torch.arange(N)[None]
            hidden = tower.text.query_with_image(tokens, Memory(memory, mask[one]), at)
            close(got[b], tower.mim_head(hidden[0, 1:][batch.mim_index[b]]))
    close(record.concept_logits, s.concept_head(record.image_vec))
    close(record.concept_teacher, t.concept_head(record.image_key))


@torch.no_grad()
def test_psl_attention_may_read_the_teachers_image():
    run = make_run(("psl",), objectives__psl__image_source="teacher", objectives__psl__recommend="off")
    model, batch = make_model(run), make_batch()
    for p in model.teacher.master.vision.parameters():
        p.add_(0.1 * torch.randn_like(p))
    rows, _ = count_passes(model)
    record, _ = run_forward(model, run, batch)
    assert rows["teacher vision"] == 1
    other, _ = run_forward(model, make_run(("psl",), objectives__psl__recommend="off"), batch)
    assert not torch.allclose(record.cls_attention, other.cls_attention, atol=1e-6)


def test_sampled_negatives_leave_out_the_same_image():
    batch = make_batch()
    batch.image_id = torch.tensor([1, 1, 2, 2])
    excluding, allowing = make_run(("itm",)), make_run(("itm",), objectives__itm__exclude_same_image=False)
    model = make_model(excluding)
    torch.manual_seed(0)
    partners = {True: set(), False: set()}
    with torch.no_grad():
        for _ in range(20):
            for run in (excluding, allowing):
                record, _ = run_forward(model, run, batch)
                for drawn in (record.negative_image, record.negative_text):
                    partners[run is excluding] |= set(enumerate(drawn.tolist()))
    assert partners[True] == {(a, b) for a in (0, 1) for b in (2, 3)} | {(a, b) for a in (2, 3) for b in (0, 1)}
    assert partners[False] == {(a, b) for a in range(4) for b in range(4) if a != b}


def test_negatives_compare_the_student_with_the_teachers_keys():
    """w_t2i = softmax(t . v' / temp): hard negatives are the arg max of these, per direction."""
    run = make_run(("itm",), objectives__itm__negatives="hard")
    model, batch = make_model(run), make_batch()
    with torch.no_grad():
        for p in model.teacher.master.parameters():
            p.add_(0.1 * torch.randn_like(p))
        record, _ = run_forward(model, run, batch)
    own = torch.eye(B, dtype=torch.bool)
    text_to_image = (record.text_vec @ record.image_key.T).masked_fill(own, -9)
    image_to_text = (record.image_vec @ record.text_key.T).masked_fill(own, -9)
    assert torch.equal(record.negative_image, text_to_image.argmax(1))
    assert torch.equal(record.negative_text, image_to_text.argmax(1))


def test_widths_that_mim_cannot_join_are_refused():
    with pytest.raises(UserError, match=r"text\.width"):
        make_model(make_run(("mim",), text__width=32))
    assert make_model(make_run(("itc", "mlm"), text__width=32)) is not None


def test_the_temperature_is_clamped():
    model = make_model(make_run(("itc",)))
    assert model.temperature.item() == pytest.approx(0.07)
    for value, expected in ((7.0, 0.5), (-1.0, 0.001), (0.2, 0.2)):
        with torch.no_grad():
            model.scale.temperature.fill_(value)
        model.scale.clamp()
        assert model.temperature.item() == pytest.approx(expected)


def test_the_concept_head_can_start_at_the_prior():
    head = make_model(make_run(("psl",), objectives__psl__bias_log_prior=True)).student.concept_head
    torch.testing.assert_close(head.bias.detach(), torch.full((VOCAB,), 5 / VOCAB).log())


@pytest.mark.parametrize("official", [False, True])
def test_a_low_precision_teacher_runs_beside_autocast(official):
    """bfloat16 copy under autocast: all losses finite and near the float32 ones."""
    from simla_ray.models.model import Model

    run = make_run(variant="official" if official else "default", queue=16)
    exact = make_model(run)
    torch.manual_seed(0)
    low = Model(run, VOCAB, torch.bfloat16).train()
    low.student.load_state_dict(exact.student.state_dict())
    low.itm_head.load_state_dict(exact.itm_head.state_dict())
    low.queue.load_state_dict(exact.queue.state_dict())
    low.teacher.copy_from(low.student)
    shift = Negatives((torch.arange(B) + 1) % B, (torch.arange(B) + 2) % B)
    _, expected = run_forward(exact, run, make_batch(), given=shift)
    with torch.autocast("cpu", torch.bfloat16):
        _, terms = run_forward(low, run, make_batch(), given=shift)
    for name in NAMES:
        assert terms[name].loss.item() == pytest.approx(expected[name].loss.item(), rel=0.05), name
    sum(t.loss for t in terms.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in low.parameters())
