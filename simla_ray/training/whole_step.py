"""ITC among all pairs of a step, over micro-batches and workers: ``objectives.itc.scope: step``.

The loss of G pairs needs the vectors of all of them, but the towers' activations of one micro-batch at a time: vectors
first, then the loss and its gradient with respect to the vectors, then the towers' backward passes, micro-batch by
micro-batch. Each worker computes the rows of its own pairs against the columns of all (open_clip's ``local_loss`` with
``gather_with_grad``), and gets the exact gradient of the whole, whatever the number of workers and micro-batches.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simla_ray.config.enums import SameImage
from simla_ray.config.schema import Run
from simla_ray.models.forward import forward_dual
from simla_ray.models.model import Model
from simla_ray.models.precision import autocast
from simla_ray.objectives.terms import contrast
from simla_ray.training.comm import Comm
from simla_ray.types import Batch, LossTerm


class Vectors(nn.Module):
    """Unit vectors of a micro-batch, (B, E) of images and of texts; what DistributedDataParallel wraps here."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        record = forward_dual(self.model, batch)
        assert record.image_vec is not None and record.text_vec is not None
        return record.image_vec, record.text_vec


def backward_over_step(
    run: Run, wrapped: nn.Module, model: Model, batches: list[tuple[int, Batch]], comm: Comm
) -> LossTerm:
    """Backward pass of the whole step's ITC into ``.grad``; -> this worker's rows' mean loss.

    Args:
        wrapped: ``Vectors``, or its DistributedDataParallel.
        batches: (seed of its dropout, micro-batch) of this worker.

    A single micro-batch keeps its graph; several are run twice, first for their vectors alone, with the same dropout.
    """
    itc = run.objectives.itc
    assert itc is not None and model.scale is not None
    device, once = batches[0][1].image.device, len(batches) == 1

    def vectors(i: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(batches[i][0])
        with autocast(run, device):
            return wrapped(batches[i][1])

    if once:
        kept = vectors(0)
        parts = [kept]
    else:
        with torch.no_grad():
            parts = [vectors(i) for i in range(len(batches))]
    image, text = (torch.cat([p[side].detach() for p in parts]) for side in (0, 1))
    total = run.micro_batches
    images, texts = comm.cat(image, total), comm.cat(text, total)
    every_image, every_text = torch.cat(images).requires_grad_(), torch.cat(texts).requires_grad_()
    rows, first = len(image), sum(map(len, images[: comm.rank]))
    ids = torch.cat([batch.image_id for _, batch in batches]) if itc.same_image is SameImage.positive else None
    term = contrast(
        itc, every_image[first : first + rows], every_text[first : first + rows], every_image, every_text, model.scale,
        image_id=ids, key_id=torch.cat(comm.cat(ids, total)) if ids is not None else None, first=first,
    )  # fmt: skip
    scalars = list(model.scale.parameters())
    share = len(batches) * comm.world / total  # other than 1 where some workers have a micro-batch more than others
    of_image, of_text, *of_scalars = torch.autograd.grad(
        share * itc.weight * term.loss, [every_image, every_text, *scalars]
    )
    # A column's gradient comes from the rows of all workers. DistributedDataParallel then takes the mean over workers
    # of what follows, which makes these sums the gradient of the mean over all rows.
    of_image, of_text = (comm.sum(g)[first : first + rows].split(len(batches[0][1])) for g in (of_image, of_text))
    for i in range(len(batches)):
        last = i == len(batches) - 1
        waits = isinstance(wrapped, DistributedDataParallel) and not last
        with wrapped.no_sync() if waits else nullcontext():  # type: ignore[operator]
            image, text = kept if once else vectors(i)
            of_rows = (image * of_image[i]).sum() + (text * of_text[i]).sum()
            if last:
                of_rows = of_rows + torch.stack([p * g for p, g in zip(scalars, of_scalars, strict=True)]).sum()
            of_rows.backward()
    return term
