import numpy as np

from simla_ray.data.masking import mask_patches, mask_regions, mask_words
from simla_ray.data.regions import grid_boxes


def test_words_are_masked_80_10_10_and_never_specials():
    rng = np.random.default_rng(0)
    ids = np.arange(10, 1010)
    maskable = np.ones(1000, dtype=bool)
    maskable[::10] = False
    fates = np.zeros(4)
    for _ in range(100):
        masked = mask_words(ids, maskable, 0.3, 3, 5000, rng)
        assert not masked.chosen[~maskable].any()
        assert np.array_equal(masked.ids[~masked.chosen], ids[~masked.chosen])
        seen = masked.ids[masked.chosen]
        own = ids[masked.chosen]
        fates += [len(seen), (seen == 3).sum(), (seen == own).sum(), ((seen != 3) & (seen != own)).sum()]
    assert abs(fates[0] / (900 * 100) - 0.3) < 0.01
    assert np.allclose(fates[1:] / fates[0], [0.8, 0.1, 0.1], atol=0.01)


def test_patches_come_in_blocks_up_to_the_limit():
    rng = np.random.default_rng(0)
    counts, neighbours = [], []
    for _ in range(200):
        mask = mask_patches(16, 75, rng).reshape(16, 16)
        counts.append(mask.sum())
        neighbours.append((mask[:, 1:] & mask[:, :-1]).sum() / max(1, mask.sum()))
    assert max(counts) <= 75
    assert np.mean(counts) > 60
    assert np.mean(neighbours) > 0.6  # scattered patches at this rate would have 0.29


def test_small_grids_are_masked_too():
    rng = np.random.default_rng(0)
    counts = [mask_patches(6, 10, rng).sum() for _ in range(200)]
    assert max(counts) <= 10
    assert min(counts) >= 1
    assert np.mean(counts) > 7


def test_whole_words_are_chosen_with_all_their_pieces():
    """Words of one to four pieces; a word is chosen as often as a piece; its pieces have fates of their own."""
    sizes = np.tile([1, 2, 3, 4], 100)
    starts = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    ids, maskable = np.arange(10, 10 + len(starts)), np.ones(len(starts), dtype=bool)
    maskable[0] = False
    share, mixed = [], 0
    for seed in range(50):
        masked = mask_words(ids, maskable, 0.3, 3, 5000, np.random.default_rng(seed), starts)
        again = mask_words(ids, maskable, 0.3, 3, 5000, np.random.default_rng(seed), starts)
        assert np.array_equal(masked.ids, again.ids) and not masked.chosen[0]
        assert np.array_equal(masked.chosen[1:], masked.chosen[starts][1:])
        share.append(masked.chosen[starts == np.arange(len(starts))].mean())
        fates = (masked.ids == 3)[masked.chosen]
        mixed += 0 < fates.mean() < 1
    assert abs(np.mean(share) - 0.3) < 0.02 and mixed == 50


def test_regions_are_masked_alone_where_they_do_not_overlap_and_at_least_one_is():
    rng = np.random.default_rng(0)
    cells = grid_boxes(4)
    counts = [mask_regions(cells, 0.15, rng, overlaps=True).sum() for _ in range(4000)]
    assert min(counts) == 1
    none = 0.85**16  # these get one
    assert abs(np.mean(counts) - (16 * 0.15 + none)) < 0.1


def test_what_shows_a_hidden_region_is_hidden_with_it():
    """The whole image shows an object; an object shows little of the image; a detector's regions are left alone."""
    boxes = np.array([[0, 0, 1, 1], [0.1, 0.1, 0.4, 0.4], [0.6, 0.6, 0.9, 0.9], [0.1, 0.15, 0.4, 0.45]])
    seen = {overlaps: set() for overlaps in (True, False)}
    for overlaps, found in seen.items():
        rng = np.random.default_rng(1)
        for _ in range(2000):
            found.add(tuple(mask_regions(boxes, 0.2, rng, overlaps=overlaps).tolist()))
    assert (True, False, False, False) in seen[True]
    for whole, first, second, beside in seen[True]:
        assert first == beside and (whole or not (first or second))
    assert (False, True, False, False) in seen[False]
