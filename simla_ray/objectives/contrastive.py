"""Image-text contrast, ITC (official ``SIMLA.forward``, the same as ALBEF's)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simla_ray.types import LossTerm


def similarities(query: Tensor, key: Tensor, queue: Tensor | None, temperature: Tensor) -> Tensor:
    """query (B, E), key (B, E), queue (Q, E), all with unit rows -> (B, B + Q): cosines over the temperature."""
    # float32 also under autocast: at a temperature of 0.01 bfloat16 products would move the logits by 0.4.
    with torch.autocast(query.device.type, enabled=False):
        logits = query @ key.T
        if queue is not None:
            # In this order: query @ queue.T takes a CPU more than twice as long.
            logits = torch.cat([logits, (queue.to(query.dtype) @ query.T).T], 1)
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
    key_id: Tensor | None = None,
    first: int = 0,
) -> LossTerm:
    """InfoNCE against keys and queue, with soft targets.

        s = [image . text_keys, image . text_queue] / temperature     y = (1 - alpha) onehot + alpha softmax(s of the
        keys) loss = mean over both directions and all rows of  -sum_j y_j log softmax(s)_j

    Args:
        image, text: (B, E) unit rows of the student.
        image_key, text_key: (G, E) unit rows of the teacher, row ``first + b`` being the other half of row b; in a
            micro-batch G is B. Without a teacher: the student's, with gradient, and alpha 0.
        image_queue, text_queue: (Q, E) older keys.
        image_id: (B,) int64. Given, the hard target is uniform over all keys of the same image; None leaves them
            negatives, as in the official pretraining.
        key_id: (G + Q,) int64, the image ids of keys and queue; needed with image_id.

    The gradient reaches the temperature through s only.
    """
    B = len(image)
    own = torch.arange(first, first + B, device=image.device)
    images, texts = image, text
    if alpha > 0:  # the teacher's vectors ask the same keys, and a queue is read once for both
        images = torch.cat([image, image_key[first : first + B].detach()])
        texts = torch.cat([text, text_key[first : first + B].detach()])
    s_i2t = similarities(images, text_key, text_queue, temperature)
    s_t2i = similarities(texts, image_key, image_queue, temperature)
    (s_i2t, *soft_i2t), (s_t2i, *soft_t2i) = s_i2t.split(B), s_t2i.split(B)
    log_i2t, log_t2i = s_i2t.log_softmax(1), s_t2i.log_softmax(1)
    if image_id is None:
        hard_loss = -(log_i2t.gather(1, own[:, None]).mean() + log_t2i.gather(1, own[:, None]).mean()) / 2
    else:
        assert key_id is not None
        hard = (image_id[:, None] == key_id[None, :]).to(s_i2t.dtype)
        hard = hard / hard.sum(1, keepdim=True)
        hard_loss = -((hard * log_i2t).sum(1).mean() + (hard * log_t2i).sum(1).mean()) / 2
    loss = hard_loss
    if alpha > 0:
        q_i2t, q_t2i = soft_i2t[0].detach().softmax(1), soft_t2i[0].detach().softmax(1)
        soft_loss = -((q_i2t * log_i2t).sum(1).mean() + (q_t2i * log_t2i).sum(1).mean()) / 2
        loss = (1 - alpha) * hard_loss + alpha * soft_loss
    accuracy = ((s_i2t.argmax(1) == own).float().mean() + (s_t2i.argmax(1) == own).float().mean()) / 2
    return LossTerm(
        loss, {"hard": hard_loss.detach(), "accuracy": accuracy, "temperature": temperature.detach().clone()}
    )


def sigmoid_loss(
    image: Tensor,
    text_key: Tensor,
    temperature: Tensor,
    bias: Tensor,
    image_id: Tensor | None = None,
    key_id: Tensor | None = None,
    first: int = 0,
) -> LossTerm:
    """SigLIP's loss: every pair is a question of its own, is this the picture's caption?

        mean over images i of  sum_j softplus(-z_ij (cosine_ij / temperature + bias))     z = 1 for a pair, else -1

    Args:
        image: (B, E) unit rows. text_key: (G, E) unit rows, row ``first + b`` being image b's own.
        image_id, key_id: (B,), (G,) int64. Given, all captions of an image count as its own.

    Source: SigLIP, arXiv 2303.15343, eq. 1.
    """
    own = torch.arange(first, first + len(image), device=image.device)
    cosines = similarities(image, text_key, None, temperature)
    if image_id is None:
        mine = own[:, None] == torch.arange(len(text_key), device=image.device)
    else:
        assert key_id is not None
        mine = image_id[:, None] == key_id[None, :]
    sign = mine.to(cosines.dtype) * 2 - 1
    loss = F.softplus(-sign * (cosines + bias)).sum(1).mean()
    accuracy = (cosines.argmax(1) == own).float().mean()
    metrics = {"hard": loss, "accuracy": accuracy, "temperature": temperature, "bias": bias}
    return LossTerm(loss, {name: value.detach().clone() for name, value in metrics.items()})
