"""Which passes a set of objectives asks for."""

from __future__ import annotations

from dataclasses import dataclass

from simla_ray.config.schema import KeywordSelect, Objectives, Recommend, Side, SoftDim

#: Objectives whose student passes let words and patches meet.
FUSED = {"itm", "mlm", "mim", "wpa", "wpg", "mrfr", "mrc", "mrckl", "answers", "labels"}


@dataclass(frozen=True)
class Needs:
    """What the objectives of a phase read. Static: it never depends on data."""

    itc: bool
    itm: bool
    mlm: bool
    mim: bool
    psl: bool
    wpa: bool
    mcr: bool
    wpg: bool
    mrfr: bool
    mrc: bool
    mrckl: bool
    mlm_teacher: bool
    mlm_grid: bool  # logits of every position, not only of the masked ones
    mim_teacher: bool
    psl_attention: Side | None  # whose text weights give the keyword attention; None: no such pass
    psl_recommend: bool
    psl_teacher: bool  # the keyword attention reads the teacher's text weights or image tokens
    answers: bool
    labels: bool

    @classmethod
    def of(cls, objectives: Objectives, active: set[str], *, has_teacher: bool) -> Needs:
        mlm, mim, psl = objectives.mlm, objectives.mim, objectives.psl
        names = ("itc", "itm", "mlm", "mim", "psl", "wpa", "mrfr", "mrc", "mrckl", "mcr", "wpg", "answers", "labels")
        on = {name: name in active for name in names}
        keyword_pass = on["psl"] and psl is not None and psl.select is KeywordSelect.attention
        return cls(
            **on,
            mlm_teacher=on["mlm"] and mlm is not None and mlm.soft_alpha > 0 and has_teacher,
            mlm_grid=on["mlm"] and mlm is not None and mlm.soft_dim is SoftDim.sequence,
            mim_teacher=on["mim"] and mim is not None and mim.soft_alpha > 0 and has_teacher,
            psl_attention=psl.attention if keyword_pass and psl is not None else None,
            psl_teacher=keyword_pass
            and psl is not None
            and has_teacher
            and Side.teacher in (psl.attention, psl.image_source),
            psl_recommend=on["psl"]
            and psl is not None
            and psl.recommend is not Recommend.off
            and psl.soft_alpha > 0
            and has_teacher,
        )

    @property
    def text_only(self) -> bool:
        return self.itc or self.itm

    @property
    def teacher_image(self) -> bool:
        return self.text_only or self.mlm_teacher or self.psl_recommend

    @property
    def fusion(self) -> bool:
        """Any pass, the student's or the teacher's, in which words and patches meet."""
        fused = self.itm or self.mlm or self.mim or self.wpa or self.wpg or self.hides_regions
        return fused or self.psl_attention is not None or self.question

    @property
    def hides_regions(self) -> bool:
        """The pass in which regions are masked."""
        return self.mrfr or self.mrc or self.mrckl

    @property
    def question(self) -> bool:
        """The pass of a fine-tuned task: a question or a statement over its image."""
        return self.answers or self.labels

    @property
    def towers_alone(self) -> bool:
        """Two towers that never see each other, the student's: the dual family."""
        return self.itc and not (self.fusion or self.psl)

    @property
    def teacher(self) -> bool:
        """Any pass through the teacher."""
        return self.teacher_image or self.mim_teacher or self.psl_teacher
