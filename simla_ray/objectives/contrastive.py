"""Image-text contrast, ITC (official ``SIMLA.forward``, the same as ALBEF's)."""

from __future__ import annotations

import torch
from torch import Tensor

from simla_ray.types import LossTerm


def similarities(query: Tensor, key: Tensor, queue: Tensor | None, temperature: Tensor) -> Tensor:
    """query (B, E), key (B, E), queue (Q, E), all with unit rows -> (B, B + Q): cosines over the temperature."""
    # float32 also under autocast: at a temperature of 0.01 bfloat16 products would move the logits by 0.4.
    with torch.autocast(query.device.type, enabled=False):
        logits = query @ key.T
        if queue is not None:
            logits = torch.cat([logits, query @ queue.T.to(query.dtype)], 1)
        return logits / temperature


def itc_loss(
    image: Tensor,
    text: Tensor,
    image_key: Tensor,
    text_key: Tensor,
    temperature: Tensor,
    alpha: float = 0.0,
    image_queue: Tensor | None = None,
    text_queue: Tensor | None = None,
    image_id: Tensor | None = None,
    queue_id: Tensor | None = None,
) -> LossTerm:
    """InfoNCE against keys and queue, with soft targets.

        s = [image . text_keys, image . text_queue] / temperature     y = (1 - alpha) onehot + alpha softmax(s of the
        keys) loss = mean over both directions and all rows of  -sum_j y_j log softmax(s)_j

    Args:
        image, text: (B, E) unit rows of the student.
        image_key, text_key: (B, E) unit rows of the teacher. Without a teacher: the student's, with gradient, and alpha
        0. image_queue, text_queue: (Q, E) older keys.
        image_id, queue_id: (B,), (Q,) int64. Given, the hard target is uniform over all keys of the same image; None
        leaves
            them negatives, as in the official pretraining.

    The gradient reaches the temperature through s only.
    """
    B = len(image)
    s_i2t = similarities(image, text_key, text_queue, temperature)
    s_t2i = similarities(text, image_key, image_queue, temperature)
    hard = torch.zeros_like(s_i2t)
    hard[:, :B] = torch.eye(B, dtype=hard.dtype, device=hard.device)
    if image_id is not None:
        ids = image_id if queue_id is None else torch.cat([image_id, queue_id])
        hard = (image_id[:, None] == ids[None, :]).to(hard.dtype)
        hard = hard / hard.sum(1, keepdim=True)
    log_i2t, log_t2i = s_i2t.log_softmax(1), s_t2i.log_softmax(1)
    hard_loss = -((hard * log_i2t).sum(1).mean() + (hard * log_t2i).sum(1).mean()) / 2
    loss = hard_loss
    if alpha > 0:
        with torch.no_grad():
            q_i2t = similarities(image_key, text_key, text_queue, temperature).softmax(1)
            q_t2i = similarities(text_key, image_key, image_queue, temperature).softmax(1)
        soft_loss = -((q_i2t * log_i2t).sum(1).mean() + (q_t2i * log_t2i).sum(1).mean()) / 2
        loss = (1 - alpha) * hard_loss + alpha * soft_loss
    own = torch.arange(B, device=image.device)
    accuracy = ((s_i2t.argmax(1) == own).float().mean() + (s_t2i.argmax(1) == own).float().mean()) / 2
    return LossTerm(
        loss, {"hard": hard_loss.detach(), "accuracy": accuracy, "temperature": temperature.detach().clone()}
    )
